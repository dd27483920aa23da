"""Upscale images with the bundled weights, or with your own.

    python upscale.py in.png out.png
    python upscale.py folder/ large/                 every image of a folder and its subfolders
    python upscale.py a.jpg b.png large/             several images: into a folder, ending in /
    python upscale.py in.png out.png --outscale 2    twice the size instead of four times

Grey stays grey, and images are turned upright. Transparency, ICC profile, DPI, EXIF, XMP and the
texts of a PNG are kept where the output can hold them. Palettes become RGB, CMYK becomes sRGB, 16
bits per channel become 8. Several processes may fill one folder: each image is made once.
Exit status: 0; 1 if some images failed and the others are done; 2 for wrong usage or input.
"""
import argparse
import contextlib
import errno
import io
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import srgan
from srgan import InputError

WEIGHTS = Path(__file__).resolve().parent / "weights"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".webp": "WEBP",
           ".avif": "AVIF", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP", ".ppm": "PPM"}
SAVE = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95},
        "AVIF": {"quality": 95, "subsampling": "4:4:4"},
        "TIFF": {"compression": "tiff_adobe_deflate"}}
OPAQUE = ("JPEG", "BMP", "PPM")                      # no transparency
NO_PROFILE = ("BMP", "PPM")                          # nor any other data
NO_GREY = ("WEBP", "AVIF")                           # grey is stored as RGB
LONGEST = {"JPEG": 65_500, "WEBP": 16_383, "AVIF": 32_768}       # pixels per side
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def main():
    args = parse_args()
    began = time.monotonic()
    Image.MAX_IMAGE_PIXELS = args.max_megapixels * 1e6 / 2       # Pillow refuses twice as much

    # Decide what becomes which file, and leave out what an earlier run has done.
    planned = plan(args)
    jobs = [job for job in planned if args.overwrite or not is_done(job[1])]
    kept = len(planned) - len(jobs)
    if kept and not Path(args.output).is_dir():
        raise InputError(f"{args.output} exists and is replaced only with --overwrite; a "
                         "folder for several images ends in /")
    if kept:
        srgan.say(f"{kept} of {len(planned)} exist and are kept; --overwrite replaces them")
    if not jobs:
        print(f"{args.output}: nothing to do")
        return 0

    # Load the network.
    device = srgan.pick_device(args.device)
    name, generator = load_model(args, device)
    args.precision = srgan.pick_precision(device, args.precision)
    srgan.say(f"{name}, x{generator.arch['scale']}, on {device}, in {args.precision}")

    # Upscale, and say what went wrong or was left behind.
    outcome = upscale_all(jobs, generator, args)
    if len(outcome.failures) == len(planned) == 1:
        raise InputError(outcome.failures[0])
    for failure in outcome.failures:
        srgan.say(failure)
    for note, paths in outcome.notes.items():
        others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        srgan.say(f"{paths[0]}{others}: {note}")

    # Say what was done.
    sizes = outcome.sizes
    megapixels = sum(width * height for width, height in sizes) / 1e6
    done = f"{args.output}: {len(sizes)} of {len(jobs)} images, {megapixels:.1f} megapixels"
    if len(jobs) == len(sizes) == 1:
        width, height = sizes[0]
        done = f"{jobs[0][1]}: {width}x{height} pixels"
    print(f"{done}, {args.precision}, {time.monotonic() - began:.1f} s")
    if not outcome.failures:
        return 0
    return 1 if sizes or kept else 2


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
    add("--ext", choices=("auto", "png", "jpg", "webp", "avif"), default="auto",
        help="format in an output folder (default: auto, the input's or else png)")
    add("--tile", type=int, metavar="N", help="side of the tiles, in input pixels (default: "
        "1448; at x8 724); 0: no tiles. Smaller tiles take less memory; the result is the same")
    add("--overwrite", action="store_true", help="replace outputs that exist, but never inputs")
    add("--max-megapixels", type=float, metavar="N", default=179,
        help="refuse larger inputs (default: %(default)g)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ...")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="auto: the faster one, by a short measurement; bf16 loses 0.01 dB")
    args = parser.parse_args()
    if args.blend is not None and not 0 <= args.blend <= 1:
        parser.error("--blend must be from 0 to 1")
    if args.outscale is not None and not 0 < args.outscale <= 64:
        parser.error("--outscale must be above 0 and at most 64")
    if args.tile is not None and args.tile < 0:
        parser.error("--tile must be 0 or above")
    if not args.max_megapixels > 0:
        parser.error("--max-megapixels must be above 0")
    return args


def plan(args):
    """[(input path, output path)] of all inputs. Raises InputError for unusable arguments."""
    target = Path(args.output)
    key = str.lower if ignores_case(target) else str
    if len(args.input) > 1 or Path(args.input[0]).is_dir() or args.output.endswith(("/", os.sep)):
        jobs = plan_folder(args.input, target, args.ext, key)
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

    # An input is known by its name and, as it may have several, by what the disk calls it.
    inputs = set()
    Image.init()                                     # fills Image.SAVE
    for source, _ in jobs:
        inputs.add(key(os.path.realpath(source)))
        inputs.add(identity(source))
    for _, result in jobs:
        is_input = os.path.exists(result) and identity(result) in inputs
        if is_input or key(os.path.realpath(result)) in inputs:
            raise InputError(f"{result} is an input and is never overwritten; name another output")
        if FORMATS[result.suffix.lower()] not in Image.SAVE:
            raise InputError(f"{result}: this version of Pillow cannot write it; pip install "
                             f"{srgan.INSTALL[result.suffix.lower()]}")
    return jobs


def identity(path):
    """The same for all links to a file."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def plan_folder(inputs, target, ext, key):
    """The jobs of plan() if the output is a folder, in which names of equal key(name) are one."""
    if target.is_file() or target.suffix.lower() in FORMATS and not target.is_dir():
        raise InputError(f"{target} is a file name; a folder for several images ends in /")

    # An image keeps its name, with the path below the folder that was given.
    names = {}
    for entry in map(Path, inputs):
        if not entry.is_dir():
            names[entry] = Path(entry.name)
        elif is_inside(entry, target):
            raise InputError(f"{target} holds the input; name another folder")
        for path in srgan.find_images(entry):
            if entry.is_dir() and not is_inside(path, target):   # not a result of an earlier run
                names[path] = path.relative_to(entry)
    results = {path: result_name(name, ext) for path, name in names.items()}

    # Where a.jpg and a.png would both become a.png, they become a.jpg.png and a.png.png.
    taken = Counter(key(str(result)) for result in results.values())
    for path, result in results.items():
        if taken[key(str(result))] > 1:
            results[path] = result.with_name(names[path].name + result.suffix)
    first = {}
    for path, result in results.items():
        other = first.setdefault(key(str(result)), path)
        if other != path:
            raise InputError(f"{path} and {other} would both become {target / result}")
    return [(path, target / result) for path, result in results.items()]


def is_inside(path, folder):
    """Whether a path is a folder or lies in it, by whatever name."""
    path = path.resolve()
    return folder.is_dir() and any(folder.samefile(place) for place in (path, *path.parents))


def result_name(name, ext):
    """The name of an image's result in an output folder."""
    if ext != "auto":
        return name.with_suffix(f".{ext}")
    if name.suffix.lower() not in FORMATS or name.suffix.lower() == ".bmp":      # may have alpha
        return name.with_suffix(".png")
    return name


def ignores_case(folder):
    """Whether a.png and A.png are one file in a folder. Raises InputError if it cannot be written.

    A folder that does not exist yet will be like the one in which it is made.
    """
    while not folder.is_dir():
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".upscale") as file:
            file.write(bytes(2 ** 16))
            file.flush()
            return Path(folder, Path(file.name).name.upper()).exists()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None


def is_done(result):
    """Whether a result exists; an empty file, as a power cut may leave it, does not count."""
    return os.path.lexists(result) and not (os.path.isfile(result) and not os.path.getsize(result))


def load_model(args, device):
    """(name, generator for inference) that the options ask for. Raises InputError."""
    if args.ckpt:
        name = args.ckpt
        generator = srgan.load_generator(args.ckpt, device)
    elif args.blend is not None:
        name = f"blend {args.blend:g}"
        generator = srgan.load_generator(WEIGHTS / "srresnet.pth", device)
        end = srgan.load_generator(WEIGHTS / "srgan.pth", device)

        # In place: (1 - blend) times SRResNet's weights + blend times SRGAN's.
        srgan.ema_(srgan.float_state(generator), srgan.float_state(end), 1 - args.blend)
    else:
        name = args.model or "srgan"
        generator = srgan.load_generator(WEIGHTS / f"{name}.pth", device)
    return name, srgan.optimize_for_inference(generator)


class Outcome:
    """What has become of the images."""

    def __init__(self):
        self.sizes = []                              # (width, height) of each result
        self.failures = []                           # a line about each image that failed
        self.notes = {}                              # {note: paths of the images}
        self.disk_failed = False

    def note(self, note, path):
        self.notes.setdefault(note, []).append(path)


def upscale_all(jobs, generator, args):
    """Upscale and save each (input path, output path). Returns an Outcome.

    A thread saves a result while the next one is computed, so at most two are in memory.
    """
    outcome = Outcome()
    shows_progress = sys.stderr.isatty()
    shows_parts = shows_progress and len(jobs) == 1
    saving = []
    with ThreadPoolExecutor(1) as pool:
        for source, result in tqdm(jobs, unit="image", disable=shows_parts or not shows_progress):
            with contextlib.ExitStack() as claim:
                try:
                    claim.enter_context(claimed(result))
                    if is_done(result) and not args.overwrite:
                        outcome.note("skipped, as another process has made it", result)
                        continue
                    image = decode(source, result, args.outscale or generator.arch["scale"])
                    pixels = enlarge(source, image, generator, args, shows_parts)
                except Timeout:
                    outcome.note("skipped, as another process is making it", result)
                    continue
                except OSError as error:
                    reason = srgan.one_line(error)
                    outcome.failures.append(f"{result}: cannot be written ({reason})")
                    continue
                except InputError as error:
                    outcome.failures.append(str(error))
                    continue
                for note in image.info["notes"]:
                    outcome.note(note, source)
                # Wait for the previous result, then hand over this one with its claim.
                wait(saving)
                if outcome.disk_failed:
                    break
                saving = [pool.submit(save, image, pixels, args.outscale, result, outcome,
                                      claim.pop_all())]
                del image, pixels                    # the thread frees them when they are saved
    return outcome


@contextlib.contextmanager
def claimed(result):
    """Tell other processes that this one makes a result. Raises Timeout if another one does."""
    lock = FileLock(f"{srgan.temporary_path(result)}.lock", thread_local=False)
    with lock.acquire(timeout=0):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):       # Windows removes it by itself
                os.remove(lock.lock_file)


def decode(source, result, scale):
    """Open an image, if the format of `result` can hold its enlargement. Raises InputError."""
    image = srgan.open_image(source)
    form = FORMATS[result.suffix.lower()]
    if "A" in image.mode and form in OPAQUE:
        raise InputError(f"{source}: {form} has no transparency; write PNG or WebP")
    if max(image.size) * scale > LONGEST.get(form, np.inf):
        raise InputError(f"{source}: {form} allows at most {LONGEST[form]:,} pixels per side; "
                         "write PNG")
    # Convert to sRGB where the profile cannot be stored, or is for grey that becomes RGB.
    info = image.info
    is_for_grey = info.get("icc_profile", b"")[16:20] == b"GRAY"
    if form in NO_PROFILE or is_for_grey and form in NO_GREY:
        image = srgan.to_srgb(image)
        image.info = info
        info.pop("icc_profile", None)
    return image


def enlarge(source, image, generator, args, shows_parts):
    """G's enlargement of an image from open_image: uint8 [H, W, 3]. Raises InputError."""
    colours = image.convert("RGB")
    if "A" in image.mode:
        colours = fill_hidden(colours, image.getchannel("A"))
    try:
        return srgan.upscale(generator, np.array(colours), tile=args.tile, ensemble=args.ensemble,
                             precision=args.precision, progress=shows_parts)
    except MemoryError:
        raise InputError(f"{source}: out of memory; use a smaller --tile") from None


def fill_hidden(colours, alpha):
    """Replace colours that are fully transparent, often black, by those of visible pixels nearby.

    G would mix them into the visible ones beside them, as a dark rim.
    """
    visible = alpha.point([0] + 255 * [255])
    if visible.getextrema() != (0, 255):             # nothing is hidden, or everything
        return colours
    # In an image of half the size, whose pixels are the means of the visible ones, less is hidden.
    half = Image.merge("RGBA", (*colours.split(), visible)).reduce(2)
    half = fill_hidden(half.convert("RGB"), half.getchannel("A"))
    width, height = colours.size
    filled = half.resize(colours.size, Image.Resampling.NEAREST, (0, 0, width / 2, height / 2))
    filled.paste(colours, mask=visible)
    return filled


def save(image, pixels, outscale, result, outcome, claim):
    """Save `pixels`, the enlarged `image` as uint8 [H, W, 3], in its mode; then end the claim.

    Grey is the luma of the result. Alpha is enlarged bicubically, because G would leave traces in
    areas that are fully transparent.
    """
    with claim:
        try:
            large = Image.fromarray(pixels)
            if image.mode in ("L", "LA"):
                large = large.convert("L")
            if outscale:
                width, height = image.size
                size = max(1, round(width * outscale)), max(1, round(height * outscale))
                large = large.resize(size, Image.Resampling.LANCZOS)
            if "A" in image.mode:
                alpha = image.getchannel("A")
                large.putalpha(alpha.resize(large.size, Image.Resampling.BICUBIC))
            # In memory first, for an error of Pillow's encoders does not say that the disk is full.
            form = FORMATS[result.suffix.lower()]
            file = io.BytesIO()
            large.save(file, form, **save_options(image.info, form))
            with srgan.replacing(result) as temporary:
                temporary.write_bytes(file.getbuffer())
            outcome.sizes.append(large.size)
        except Exception as error:                   # any type: no memory, too long a name
            outcome.disk_failed = getattr(error, "errno", None) in DISK_ERRORS
            end = "; stopped" if outcome.disk_failed else ""
            outcome.failures.append(f"{result}: cannot be written ({srgan.one_line(error)}){end}")


def save_options(info, form):
    """Arguments of PIL.Image.save: quality, and what of srgan.info_to_keep the format can hold."""
    options = dict(SAVE.get(form, {}))
    for key in ("icc_profile", "dpi", "exif", "xmp"):
        if key in info:
            options[key] = info[key]
    if form == "WEBP" and info["lossless"]:
        options["lossless"] = True
    if form == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for key, text in info["text"].items():
            options["pnginfo"].add_text(key, text)
        if "xmp" in info:
            options["pnginfo"].add_itxt("XML:com.adobe.xmp", info["xmp"].decode(errors="replace"))
    if form in ("TIFF", "AVIF"):                     # for which Pillow writes EXIF anew
        exif = options["exif"] = Image.Exif()
        exif.load(info.get("exif", b""))
        srgan.exif_to_rewrite(exif)
    if form == "TIFF":
        if "xmp" in info:
            exif[700] = info["xmp"]
        if exif.keys() & srgan.EXIF_IFDS:            # libtiff, which compresses, cannot hold them
            del options["compression"]
    return options


if __name__ == "__main__":
    srgan.run(main)
