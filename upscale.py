"""Upscale pictures with the bundled weights, or your own.

    python upscale.py in.png out.png
    python upscale.py folder/ big/                      every picture of a folder that big/ does not hold yet
    python upscale.py a.jpg b.png big/                  several files to a folder
    python upscale.py in.png out.png --outscale 2       twice the size instead of four times

Grey stays grey, transparency and the ICC profile and DPI are kept, EXIF rotation is applied.
Palettes become RGB, CMYK becomes sRGB, 16 bits per channel become 8; in folders the results are PNG.
Exit status: 0; 1 where some pictures failed (the others are done); 2 for wrong usage or unusable input.
"""
import argparse
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import srgan
from srgan import InputError

WEIGHTS = Path(__file__).parent / "weights"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF",
           ".bmp": "BMP", ".ppm": "PPM"}
SAVE = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}
OPAQUE = ("JPEG", "BMP", "PPM")  # formats without transparency
TOGETHER = 2 ** 14  # input pixels: small pictures of one size are computed together, up to so many
IN_FLIGHT = 2 ** 28  # bytes of results that may wait to be saved while the next pictures are computed


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="+", help="pictures or folders")
    parser.add_argument("output", help="a file for one picture, else a folder (a folder for one picture: write it with a / at the end)")
    parser.add_argument("--ckpt", metavar="FILE", help="a checkpoint of train.py instead of the bundled weights")
    parser.add_argument("--model", choices=("srgan", "srresnet"), help="bundled weights: crisp, or faithful to every pixel "
                        "(default: srgan where it is bundled)")
    parser.add_argument("--blend", type=float, metavar="A", help="weights between SRResNet (0) and SRGAN (1)")
    parser.add_argument("--ensemble", action="store_true", help="mean over the eight flips and rotations: better, eight times slower")
    parser.add_argument("--outscale", type=float, metavar="S", help="final size, relative to the input")
    parser.add_argument("--tile", type=int, metavar="N", help="side of the parts computed at once, in input pixels; 0: no tiles (default: by the memory)")
    parser.add_argument("--overwrite", action="store_true", help="in an output folder, redo pictures that are there already")
    parser.add_argument("--max-megapixels", type=float, metavar="N", default=srgan.MAX_MEGAPIXELS,
                        help="refuse larger inputs: a small file may claim to be huge (default: %(default)g)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="bf16: faster, and 0.01 dB less; "
                        "auto: bf16 where the hardware computes in it")
    args = parser.parse_args()
    if args.ckpt and (args.model or args.blend is not None):
        parser.error("--ckpt takes the place of --model and --blend")
    if args.model and args.blend is not None:
        parser.error("--blend is between both models; leave --model out")
    if args.blend is not None and not 0 <= args.blend <= 1:
        parser.error("--blend must be from 0 to 1")
    if args.outscale is not None and not 0 < args.outscale <= 64:
        parser.error("--outscale must be above 0 and at most 64")
    if args.tile is not None and args.tile < 0:
        parser.error("--tile must be 0 or above")
    if not args.max_megapixels > 0:
        parser.error("--max-megapixels must be above 0")
    return args


def load_model(args, device):
    """(description, generator for inference) that the options ask for. Raises InputError."""
    def bundled(name):
        path = WEIGHTS / f"{name}.pth"
        if not path.exists():
            raise InputError(f"{path} is not bundled; train it and name it with --ckpt")
        return srgan.load_generator(path, device)

    if args.ckpt:
        name, generator = args.ckpt, srgan.load_generator(args.ckpt, device)
    elif args.blend is not None:
        name, generator, end = f"blend {args.blend:g}", bundled("srresnet"), bundled("srgan")
        srgan.ema_(srgan.float_state(generator), srgan.float_state(end), 1 - args.blend)
    else:
        name = args.model or ("srgan" if (WEIGHTS / "srgan.pth").exists() else "srresnet")
        generator = bundled(name)
    return name, srgan.optimize_for_inference(generator)


def plan(inputs, output, overwrite):
    """([(input path, output path)], the number of those left out because they are done). Raises InputError where the paths cannot be meant."""
    target, real = Path(output), os.path.realpath
    skipped, to_folder = 0, True
    if len(inputs) == 1 and not Path(inputs[0]).is_dir() and not output.endswith(("/", os.sep)):
        if target.is_dir():
            raise InputError(f"{output} is a folder; write {output}{os.sep} to put the picture into it, or name a file")
        if not target.parent.is_dir():
            raise InputError(f"{target.parent}: no such folder")
        if target.exists() and not os.access(target, os.W_OK):
            raise InputError(f"{output} is read-only")
        jobs, to_folder = [(Path(inputs[0]), target)], False
    else:
        if target.exists() and not target.is_dir():
            raise InputError(f"{output} is a file; name a folder for several pictures")
        jobs, inside = [], real(target) + os.sep
        for entry in map(Path, inputs):
            if entry.is_dir() and (real(entry) + os.sep).startswith(inside):
                raise InputError(f"{output} holds the input; name another folder")
            pictures = srgan.find_images(entry) if entry.is_dir() else [entry]
            root = entry if entry.is_dir() else entry.parent
            jobs += [(p, target / p.relative_to(root).with_suffix(".png")) for p in pictures
                     if not (entry.is_dir() and real(p).startswith(inside))]  # an output folder within the input folder
    taken, sources = {}, {real(source) for source, _ in jobs}
    for source, result in jobs:
        if real(result) in sources:
            raise InputError(f"{result} is an input, which is never overwritten; name another output")
        if result in taken:
            raise InputError(f"{source} and {taken[result]} would both become {result}")
        taken[result] = source
        if result.suffix.lower() not in FORMATS:
            raise InputError(f"{result}: take one of the endings {' '.join(FORMATS)}")
    if to_folder and not overwrite:
        jobs, before = [job for job in jobs if not job[1].is_file()], len(jobs)
        skipped = before - len(jobs)
    return jobs, skipped


def decode(source, result):
    """The picture at `source`, if the format of `result` can hold it. Raises InputError."""
    image = srgan.open_image(source)
    form = FORMATS[result.suffix.lower()]
    if "A" in image.mode and form in OPAQUE:
        raise InputError(f"{source}: {form} cannot hold its transparency; write .png or .webp")
    return image


def encode(image, pixels, outscale, result):
    """Save `pixels`, uint8 [H, W, 3], as the enlarged `image`: of its mode, by the generator's scale or to `outscale`.

    Grey pictures go through the generator as RGB and come back as its luma. Transparency is enlarged by
    bicubic interpolation: no photo, so the generator would leave traces in what is to be quite clear.
    """
    try:
        large, form = Image.fromarray(pixels), FORMATS[result.suffix.lower()]
        if image.mode in ("L", "LA"):
            large = large.convert("L")
        if "A" in image.mode:
            large.putalpha(image.getchannel("A").resize(large.size, Image.Resampling.BICUBIC))
        if outscale:
            large = large.resize([max(1, round(side * outscale)) for side in image.size], Image.Resampling.LANCZOS)
        result.parent.mkdir(parents=True, exist_ok=True)
        with srgan.replacing(result) as temporary:
            large.save(temporary, form, **image.info, **SAVE.get(form, {}))
    except Exception as error:  # a full disk, no memory, more pixels than the format allows: whatever Pillow raises
        raise InputError(f"{result}: cannot be written ({srgan.one_line(error) or type(error).__name__})") from None


def ahead(pool, function, items, n):
    """(item, future of function(*item)) in turn, the function running up to n items ahead."""
    waiting = deque()
    for item in items:
        waiting.append((item, pool.submit(function, *item)))
        if len(waiting) > n:
            yield waiting.popleft()
    yield from waiting


def together(opened):
    """Lists of consecutive (picture, result path) to be computed at once: small pictures of one size, up to TOGETHER pixels."""
    group = []
    for image, result in opened:
        if group and (image.size != group[0][0].size or (len(group) + 1) * image.width * image.height > TOGETHER):
            yield group
            group = []
        group.append((image, result))
    if group:
        yield group


def main():
    args = parse_args()
    srgan.MAX_MEGAPIXELS = args.max_megapixels
    jobs, skipped = plan(args.input, args.output, args.overwrite)
    if skipped:
        print(f"{skipped} done already and left as they are (--overwrite redoes them)", file=sys.stderr)
    if not jobs:
        return 0
    device = srgan.pick_device(args.device)
    name, generator = load_model(args, device)
    print(f"{name}, x{generator.arch['scale']}, on {device}", file=sys.stderr)
    options = {"tile": args.tile, "ensemble": args.ensemble, "precision": srgan.pick_precision(device, args.precision),
               "progress": sys.stderr.isatty()}
    failures, saving = [], deque()

    def result_of(future):
        try:
            return future.result()
        except InputError as error:
            failures.append(str(error))

    # Files are decoded and saved by threads while the next pictures are computed.
    pool = ThreadPoolExecutor()
    try:
        opened = ((image, job[1]) for job, future in ahead(pool, decode, jobs, 2) if (image := result_of(future)) is not None)
        for group in together(tqdm(opened, total=len(jobs), unit="picture", disable=len(jobs) == 1 or not sys.stderr.isatty())):
            try:
                results = srgan.upscale(generator, np.stack([np.array(image.convert("RGB")) for image, _ in group]), **options)
            except (RuntimeError, MemoryError) as error:
                if not srgan.is_out_of_memory(error):
                    raise
                failures += [f"{result}: out of memory" for _, result in group]
                continue
            for (image, result), large in zip(group, results):
                saving.append((pool.submit(encode, image, large, args.outscale, result), large.nbytes))
            results = large = None
            while len(saving) > 1 and sum(size for _, size in saving) > IN_FLIGHT:
                result_of(saving.popleft()[0])
        for future, _ in saving:
            result_of(future)
    finally:
        pool.shutdown(cancel_futures=True)  # an interruption waits for nothing that has not begun
    if len(failures) == len(jobs) == 1 and not skipped:
        raise InputError(failures[0])
    for failure in failures:
        srgan.say(failure)
    return 0 if not failures else 1 if len(failures) < len(jobs) + skipped else 2


if __name__ == "__main__":
    srgan.run(main)
