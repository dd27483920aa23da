"""Upscale images with the bundled weights, or with your own.

    python upscale.py in.png out.png
    python upscale.py folder/ large/                 every image of a folder and its subfolders
    python upscale.py a.jpg b.png large/             several images: into a folder, ending in /
    python upscale.py in.png out.png --outscale 2    twice the size instead of four times

Grey stays grey; transparency, ICC profile, DPI and EXIF data (date, camera, position) are kept, and
EXIF orientation is applied. Palettes become RGB, CMYK becomes sRGB, 16 bits per channel become 8.
Exit status: 0; 1 if some images failed and the others are done; 2 for wrong usage or input.
"""
import argparse
import contextlib
import os
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

if __name__ == "__main__":                           # Ctrl-C while torch loads
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import numpy as np
import srgan
from srgan import Image, InputError, tqdm

WEIGHTS = Path(__file__).resolve().parent / "weights"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".webp": "WEBP",
           ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP", ".ppm": "PPM"}
SAVE = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}
OPAQUE = ("JPEG", "BMP", "PPM")                      # no transparency
LONGEST = {"JPEG": 65_535, "WEBP": 16_383}           # pixels per side
UNREADABLE = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".pdf", ".svg", ".cr2", ".cr3",
              ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf", ".tga", ".exr", ".eps", ".ico")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input", nargs="+", help="images or folders")
    add("output", help="a file for one image; else a folder, ending in /")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--ckpt", metavar="FILE", help="a checkpoint of train.py")
    weights.add_argument("--model", choices=("srgan", "srresnet"),
        help="bundled weights: srgan (default), crisp; srresnet, for lettering and drawings")
    weights.add_argument("--blend", type=float, metavar="A", help="from SRResNet (0) to SRGAN (1)")
    add("--ensemble", action="store_true",
        help="mean over the eight flips and rotations: better, eight times slower")
    add("--outscale", type=float, metavar="S", help="size of the output relative to the input")
    add("--ext", choices=("auto", "png", "jpg", "webp"), default="auto",
        help="format in an output folder (default: auto, the input's or else png)")
    add("--tile", type=int, metavar="N", help="side of the tiles, in input pixels; 0: no tiles. "
        "Smaller tiles take less memory; the result is the same")
    add("--overwrite", action="store_true", help="replace outputs that exist, but never inputs")
    add("--max-megapixels", type=float, metavar="N", default=179,
        help="refuse larger inputs (default: %(default)g)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="auto: the faster one, by a short measurement; bf16 loses 0.01 dB")
    args = parser.parse_args()
    for wrong, message in (
            ("" in (*args.input, args.output, args.ckpt, args.device), "an argument is empty"),
            (args.blend is not None and not 0 <= args.blend <= 1, "--blend must be from 0 to 1"),
            (args.outscale is not None and not 0 < args.outscale <= 64,
             "--outscale must be above 0 and at most 64"),
            (args.tile is not None and args.tile < 0, "--tile must be 0 or above"),
            (not args.max_megapixels > 0, "--max-megapixels must be above 0")):
        if wrong:
            parser.error(message)
    return args


def load_model(args, device):
    """(name, generator for inference) that the options ask for. Raises InputError."""
    if args.ckpt:
        name, generator = args.ckpt, srgan.load_generator(args.ckpt, device)
    elif args.blend is not None:
        name = f"blend {args.blend:g}"
        generator, end = (srgan.load_generator(WEIGHTS / f"{model}.pth", device)
                          for model in ("srresnet", "srgan"))
        srgan.ema_(srgan.float_state(generator), srgan.float_state(end), 1 - args.blend)
    else:
        name = args.model or "srgan"
        generator = srgan.load_generator(WEIGHTS / f"{name}.pth", device)
    return name, srgan.optimize_for_inference(generator)


def plan(args):
    """[(input path, output path)] of all inputs. Raises InputError for unusable arguments."""
    target = Path(args.output)
    if len(args.input) > 1 or Path(args.input[0]).is_dir() or args.output.endswith(("/", os.sep)):
        jobs = plan_folder(args.input, target, args.ext)
    elif target.is_dir():
        raise InputError(f"{target} is a folder; write {target}{os.sep} to put the image into it")
    elif not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder")
    elif target.suffix.lower() not in FORMATS:
        raise InputError(f"{target}: choose one of the endings {' '.join(FORMATS)}")
    elif args.ext != "auto":
        raise InputError("--ext is for output folders; the output's ending gives its format")
    else:
        jobs = [(path, target) for path in srgan.find_images(args.input[0])]

    def identity(path):                              # the same for all links to a file
        return path.stat().st_dev, path.stat().st_ino
    sources = {identity(source) for source, _ in jobs}
    for _, result in jobs:
        if result.exists() and identity(result) in sources:
            raise InputError(f"{result} is an input and is never overwritten; name another output")
    return jobs


def plan_folder(inputs, target, ext):
    """The jobs of plan() if the output is a folder."""
    if target.is_file() or target.suffix.lower() in FORMATS and not target.is_dir():
        raise InputError(f"{target} is a file name; a folder for several images ends in /")
    skipped = [path.name for entry in inputs for path in sorted(Path(entry).rglob("*"))
               if path.suffix.lower() in UNREADABLE and not path.name.startswith(".")]
    if skipped:
        more = f" and {len(skipped) - 8} more" if len(skipped) > 8 else ""
        srgan.say(f"skipped, because their formats cannot be read: {', '.join(skipped[:8])}{more}; "
                  "convert them to PNG or JPEG")
    inside, found = os.path.realpath(target) + os.sep, {}
    for entry in map(Path, inputs):
        is_dir = entry.is_dir()
        if is_dir and (os.path.realpath(entry) + os.sep).startswith(inside):
            raise InputError(f"{target} holds the input; name another folder")
        found |= {path: path.relative_to(entry if is_dir else entry.parent)
                  for path in srgan.find_images(entry)
                  if not (is_dir and os.path.realpath(path).startswith(inside))}
    results = {}
    for path, name in found.items():
        if ext != "auto":
            name = name.with_suffix(f".{ext}")
        elif name.suffix.lower() not in FORMATS or name.suffix.lower() == ".bmp":  # may have alpha
            name = name.with_suffix(".png")
        results[path] = name
    taken = Counter(map(os.path.normcase, results.values()))
    for path, result in results.items():
        if taken[os.path.normcase(result)] > 1:      # a.jpg and a.png: a.jpg.png and a.png.png
            results[path] = result.with_name(found[path].name + result.suffix)
    taken = {os.path.normcase(result): path for path, result in results.items()}
    for path, result in results.items():
        if (other := taken[os.path.normcase(result)]) != path:
            raise InputError(f"{path} and {other} would both become {target / result}")
    return [(path, target / result) for path, result in results.items()]


@contextlib.contextmanager
def quiet_libraries():
    """Hide stderr, to which libtiff writes; open_image reports its errors in its own words."""
    with open(os.devnull, "w") as null:
        stderr = os.dup(2)
        os.dup2(null.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def decode(source, result, scale):
    """Open an image, if the format of `result` can hold its enlargement. Raises InputError."""
    with quiet_libraries():
        image = srgan.open_image(source)
    form = FORMATS[result.suffix.lower()]
    if "A" in image.mode and form in OPAQUE:
        raise InputError(f"{source}: {form} has no transparency; write PNG or WebP")
    if max(image.size) * scale > LONGEST.get(form, np.inf):
        raise InputError(f"{source}: {form} allows at most {LONGEST[form]:,} pixels per side; "
                         "write PNG")
    return image


def save(image, pixels, outscale, result):
    """Save `pixels`, the enlarged `image` as uint8 [H, W, 3], in its mode. Returns (W, H).

    Grey is the luma of the result. Alpha is enlarged bicubically, because G would leave traces in
    areas that are fully transparent. Raises InputError.
    """
    try:
        large, form = Image.fromarray(pixels), FORMATS[result.suffix.lower()]
        if image.mode in ("L", "LA"):
            large = large.convert("L")
        if outscale:
            large = large.resize([max(1, round(side * outscale)) for side in image.size],
                                 Image.Resampling.LANCZOS)
        if "A" in image.mode:
            alpha = image.getchannel("A")
            large.putalpha(alpha.resize(large.size, Image.Resampling.BICUBIC))
        result.parent.mkdir(parents=True, exist_ok=True)
        with srgan.replacing(result) as temporary:
            large.save(temporary, form, **image.info, **SAVE.get(form, {}))
        return large.size
    except Exception as error:                       # any type: a full disk, no memory
        raise InputError(f"{result}: cannot be written ({srgan.one_line(error)})") from None


def upscale_all(jobs, generator, outscale, **options):
    """Upscale and save each (input path, output path). Returns (sizes of the results, failures).

    A thread saves a result while the next one is computed, so at most two are in memory.
    """
    shown, saved, failures = sys.stderr.isatty(), [], []
    with ThreadPoolExecutor(1) as pool:
        for source, result in tqdm(jobs, unit="image", disable=len(jobs) == 1 or not shown):
            try:
                image = decode(source, result, outscale or generator.arch["scale"])
                pixels = srgan.upscale(generator, np.array(image.convert("RGB")),
                                       progress=len(jobs) == 1 and shown, **options)
            except InputError as error:
                failures.append(str(error))
            except MemoryError:
                failures.append(f"{source}: out of memory; use a smaller --tile")
            else:
                wait(saved[-1:])
                saved.append(pool.submit(save, image, pixels, outscale, result))
                del image, pixels                    # the thread frees them when they are saved
    failures += [str(future.exception()) for future in saved if future.exception()]
    return [future.result() for future in saved if not future.exception()], failures


def main():
    args, began = parse_args(), time.monotonic()
    Image.MAX_IMAGE_PIXELS = args.max_megapixels * 1e6 / 2           # Pillow refuses twice as much
    planned = plan(args)
    jobs = [job for job in planned if args.overwrite or not os.path.lexists(job[1])]
    skipped = len(planned) - len(jobs)
    if skipped and not Path(args.output).is_dir():
        raise InputError(f"{args.output} exists and is replaced only with --overwrite; a "
                         "folder for several images ends in /")
    if skipped:
        srgan.say(f"{skipped} of {len(planned)} exist and are kept; --overwrite replaces them")
    if not jobs:
        print(f"{args.output}: nothing to do")
        return 0
    device = srgan.pick_device(args.device)
    name, generator = load_model(args, device)
    precision = srgan.pick_precision(device, args.precision)
    srgan.say(f"{name}, x{generator.arch['scale']}, on {device}, in {precision}")
    sizes, failures = upscale_all(jobs, generator, args.outscale, tile=args.tile,
                                  ensemble=args.ensemble, precision=precision)
    if len(failures) == len(planned) == 1:
        raise InputError(failures[0])
    for failure in failures:
        srgan.say(failure)
    megapixels = sum(width * height for width, height in sizes) / 1e6
    done = f"{args.output}: {len(sizes)} of {len(jobs)} images, {megapixels:.1f} megapixels"
    if len(jobs) == len(sizes) == 1:
        done = "{}: {}x{} pixels".format(jobs[0][1], *sizes[0])
    print(f"{done}, {precision}, {time.monotonic() - began:.1f} s")
    if not failures:
        return 0
    return 1 if len(failures) < len(planned) else 2


if __name__ == "__main__":
    srgan.run(main)
