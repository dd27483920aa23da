"""SRGAN, to be read beside the paper: Ledig et al., "Photo-Realistic Single Image Super-Resolution
Using a Generative Adversarial Network", CVPR 2017, arXiv:1609.04802.

    1. Images       find, open, degrade                          Sec. 3.2
    2. Patches      the training batches                         Sec. 3.2
    3. Networks     Generator, Discriminator, TruncatedVGG19     Sec. 2.1, Fig. 4
    4. Losses       pixel, content, adversarial                  Sec. 2.2, Eq. 1 and 3 to 6
    5. Metrics      PSNR, SSIM, LPIPS                            Sec. 3.1
    6. Upscaling    whole pictures in exact tiles
    7. Checkpoints  what train.py writes and everything reads

With the paper in hand, begin with 3 and 4: 1 and 2 bring pictures in, 6 and 7 take them out.

Images are RGB. Tensors are float32 [N, 3, h, w]: LR in [0, 1], HR and SR in [-1, 1] (Sec. 3.2);
pictures at the edges are uint8 [h, w, 3]. `scale` is 2, 4 (the paper's) or 8.
"""
import copy
import hashlib
import io
import math
import os
import re
import shutil
import signal
import sys
import threading
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from tqdm import tqdm

SCALES = (2, 4, 8)
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
Image.MAX_IMAGE_PIXELS = None  # open_within_limit names the size
warnings.filterwarnings("ignore", module="PIL")  # of odd files, which either decode or do not
MAX_MEGAPIXELS = 179  # of a picture: a file of a few bytes may claim to be enormous; Pillow's limit, too
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # whatever a file is called; others may run programs
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


class InputError(ValueError):
    """Something that the person at the keyboard can put right: one line, what is wrong and what to do."""


def say(text):
    """A line on stderr; line breaks within file names are written as \\n."""
    print(text.translate({n: repr(chr(n))[1:-1] for n in range(32)}), file=sys.stderr)


def one_line(error):
    """An exception's text, to stand within a message."""
    return " ".join(str(error).split())[:200]


# ---------------------------------------------------------------------------------------------
# 1. Images. Sec. 3.2: I^LR is the bicubic x1/r of I^HR; LR is scaled to [0, 1], HR to [-1, 1].
# ---------------------------------------------------------------------------------------------

def find_images(path):
    """Sorted paths of the pictures in a folder and its subfolders; a file stands for itself. Raises InputError."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    found = sorted(p for p in path.rglob("*")
                   if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())
    if not found:
        raise InputError(f"{path}: no pictures in this folder ({' '.join(SUFFIXES)})")
    return found


def check_file(path):
    """Raise InputError for what exists and is no file: a pipe would wait for ever."""
    if Path(path).exists() and not Path(path).is_file():
        raise InputError(f"{path}: not a file")


def open_within_limit(path):
    """Image.open, reading the header alone. Raises InputError for more than MAX_MEGAPIXELS."""
    check_file(path)
    file = Image.open(path, formats=FORMATS)
    if file.width * file.height > MAX_MEGAPIXELS * 1e6:
        file.close()
        raise InputError(f"{file.width}x{file.height} pixels are more than {MAX_MEGAPIXELS:g} megapixels; raise the limit of "
                         "upscale.py with --max-megapixels if the picture is what it claims to be")
    return file


def open_image(path):
    """Decode a picture to a PIL.Image of 8 bits, upright, of mode "L", "LA", "RGB" or "RGBA".

    EXIF orientation is applied. Palettes become RGB or RGBA; CMYK becomes sRGB, through its ICC
    profile where it has one; 16 bits per channel become 8; of an animation the first frame counts.
    `info` holds "icc_profile" and "dpi" where the file had them and they still hold.
    Raises InputError for whatever cannot be read.
    """
    try:
        with open_within_limit(path) as file:
            image = ImageOps.exif_transpose(file)
            info = {key: image.info[key] for key in ("icc_profile", "dpi") if key in image.info}
            if not all(0 < dots < 1e5 for dots in info.get("dpi", ())):
                del info["dpi"]
            if image.mode == "CMYK":
                image = _cmyk_to_rgb(image, info.pop("icc_profile", None))
            elif image.mode.startswith("I"):  # 16-bit grey: 65535 / 257 = 255
                grey = np.clip(np.asarray(image), 0, 65535) / 257
                image = Image.fromarray(grey.round().astype(np.uint8))
            elif image.mode == "F":
                raise InputError("floating-point pixels have no fixed range; convert it to 8 or 16 bits first")
            else:
                mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
                image = image.convert(mode + "A" * image.has_transparency_data)
            image.info = info
            return image
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # decoders raise exceptions of every type on broken files
        raise InputError(f"{path}: cannot be read as a picture ({one_line(error)})") from None


def _cmyk_to_rgb(image, profile):
    if profile:
        from PIL import ImageCms
        try:
            return ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"),
                                             outputMode="RGB")
        except ImageCms.PyCMSError:
            pass  # a broken profile: the plain conversion is what any viewer falls back to
    return image.convert("RGB")


def open_rgb(path):
    """Decode a picture to a uint8 array [h, w, 3]; transparency is dropped. Raises InputError."""
    return np.array(open_image(path).convert("RGB"))


def to_tensor(pixels):
    """uint8 [..., h, w, 3], array or tensor -> float32 [..., 3, h, w] in [0, 1], channels-last in memory."""
    return torch.as_tensor(pixels).movedim(-1, -3).float().div(255)


def to_pixels(sr):
    """[..., 3, H, W] in [-1, 1] -> uint8 [..., H, W, 3], to the nearest grey level."""
    return sr.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)


def downsample(hr, scale=4, kernel="bicubic"):
    """I^LR from I^HR (Sec. 3.2): [N, 3, H, W] in [0, 1] -> [N, 3, H/scale, W/scale] in [0, 1], on the 8-bit grid.

    "bicubic" is Pillow's BICUBIC (a = -0.5, widened by the scale), to within one grey level.
    "gaussian" blurs with sigma = 0.4 scale and keeps one pixel of `scale` in each direction; the
    taps are centred on the LR pixel, so that both kernels give pictures that lie on each other.
    Raises ValueError where H or W is no multiple of scale.
    """
    n, c, h, w = hr.shape
    if h % scale or w % scale:
        raise ValueError(f"{h}x{w} is no multiple of {scale}")

    def on_grid(x):
        return x.clamp(0, 1).mul(255).round().div(255)

    if kernel == "bicubic":  # Pillow's two passes, the first of which leaves 8 bits, too
        lr = on_grid(F.interpolate(hr, size=(h, w // scale), mode="bicubic", antialias=True))
        lr = F.interpolate(lr, size=(h // scale, w // scale), mode="bicubic", antialias=True)
    elif kernel == "gaussian":
        margin = 5 * scale // 4  # the taps reach 3 to 4 sigma
        taps = torch.arange(-margin, scale + margin, device=hr.device) - (scale - 1) / 2
        taps = torch.softmax(-taps ** 2 / (2 * (0.4 * scale) ** 2), dim=0)  # exp(-d^2 / 2 sigma^2), sum 1
        lr = F.pad(hr.reshape(n * c, 1, h, w), [margin] * 4, mode="replicate")
        lr = F.conv2d(F.conv2d(lr, taps.view(1, 1, -1, 1), stride=(scale, 1)), taps.view(1, 1, 1, -1), stride=(1, scale))
        lr = lr.view(n, c, h // scale, w // scale)
    else:
        raise ValueError(f"unknown kernel {kernel!r}: bicubic or gaussian")
    return on_grid(lr)


def find_pairs(folder, lr_folder=None, scale=4, kernel="bicubic"):
    """[(stem, HR path, LR path or None)] of a validation or test set, sorted by stem.

    `folder` holds HR pictures, or the folders HR and LR_<kernel>_x<scale>. LR pictures made
    elsewhere bear the HR's stem, alone or with the usual endings (x4, _x4, _LR, _LRx4, _LR_x4, or
    _SRF_4_LR for an HR that ends in _SRF_4_HR). Raises InputError: a stem twice, an HR without its LR.
    """
    folder = Path(folder)
    if (folder / "HR").is_dir():
        if lr_folder is None and (folder / f"LR_{kernel}_x{scale}").is_dir():
            lr_folder = folder / f"LR_{kernel}_x{scale}"
        folder = folder / "HR"
    hr = _by_stem(folder)
    if lr_folder is None:
        return [(stem, path, None) for stem, path in sorted(hr.items())]
    lr, pairs = _by_stem(lr_folder), []
    for stem, path in sorted(hr.items()):
        base = stem.removesuffix("_HR")
        names = [stem] + [base + end for end in ("_LR", f"x{scale}", f"_x{scale}", f"_LRx{scale}", f"_LR_x{scale}")]
        match = next((lr[name] for name in names if name in lr), None)
        if match is None:
            raise InputError(f"{path}: {lr_folder} holds no LR picture for it (looked for {', '.join(names)})")
        pairs.append((stem, path, match))
    return pairs


def real_paths(pairs, *more):
    """{absolute path without links} of all files of find_pairs, and of `more` files."""
    return {os.path.realpath(path) for path in (*more, *(path for _, *both in pairs for path in both)) if path}


def _by_stem(folder):
    found = {}
    for path in find_images(folder):
        if path.stem in found:
            raise InputError(f"{path} and {found[path.stem]} have the same name; keep one of them")
        found[path.stem] = path
    return found


def split(paths, shares=(80, 15, 5), validate_on=0):
    """{"train", "val", "test"}: the paths in three parts, by percentages, the same for the same file names on any machine.

    The names' SHA-256 puts them in order; val and test have at least one picture where their share is not 0.
    Of val, train gets what exceeds `validate_on` pictures (0: nothing).
    """
    ranked = sorted(paths, key=lambda path: (hashlib.sha256(path.name.encode()).digest(), path.as_posix()))
    val, test = (max(len(ranked) * share // 100, int(share > 0)) for share in shares[1:])
    held_out = min(val, validate_on or val)
    return {"val": ranked[:held_out], "test": ranked[val:val + test], "train": sorted(ranked[held_out:val] + ranked[val + test:])}


def open_pair(hr_path, lr_path=None, scale=4, kernel="bicubic"):
    """(LR, HR) as uint8 arrays; HR is cut to a multiple of scale, LR is made from it where not given. Raises InputError."""
    hr = open_rgb(hr_path)
    h, w = (side // scale for side in hr.shape[:2])
    if not h or not w:
        raise InputError(f"{hr_path}: {hr.shape[1]}x{hr.shape[0]} is smaller than one LR pixel")
    hr = hr[:h * scale, :w * scale]
    if lr_path is None:
        return to_pixels(downsample(to_tensor(hr)[None], scale, kernel) * 2 - 1)[0].numpy(), hr
    lr = open_rgb(lr_path)
    if lr.shape != (h, w, 3):
        raise InputError(f"{lr_path}: {lr.shape[1]}x{lr.shape[0]} is not 1/{scale} of {hr_path.name} (expected {w}x{h})")
    return lr, hr


def bicubic(lr, scale=4):
    """The baseline: uint8 [h, w, 3] -> uint8 [scale h, scale w, 3] by Pillow's BICUBIC."""
    h, w = lr.shape[:2]
    return np.array(Image.fromarray(lr).resize((w * scale, h * scale), Image.Resampling.BICUBIC))


def strip(pictures, labels):
    """Pictures side by side, each with its label below: uint8 [h, w, 3] arrays of one size, strings -> PIL.Image."""
    h, w = pictures[0].shape[:2]
    lines = max(label.count("\n") for label in labels) + 1
    size = next(n for n in range(24, 7, -1) if n == 8 or all(
        ImageFont.load_default(n).getlength(line) <= w for label in labels for line in label.split("\n")))
    sheet = Image.new("RGB", (len(pictures) * (w + 4) - 4, h + (lines + 1) * size * 4 // 3), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        sheet.paste(Image.fromarray(picture), (i * (w + 4), 0))
        draw.text((i * (w + 4) + w / 2, (h + sheet.height) / 2), label, fill="black", font=font, anchor="mm", align="center")
    return sheet


# ---------------------------------------------------------------------------------------------
# 2. Patches. Sec. 3.2: "for each mini-batch we crop 16 random 96x96 HR sub images of distinct
#    training images". Every picture is decoded once, into one flat array of pixels; a batch is
#    one gather from it, the flips and rotations being part of the index, and the LR side one
#    batched downsampling. Where the pixels fit on the GPU, all of this happens there.
# ---------------------------------------------------------------------------------------------

MARGIN = 2  # LR pixels around a patch that its outermost LR pixels are computed from
SYMMETRIES = {"none": (0,), "flip": (0, 1), "all": tuple(range(8))}  # bits: mirror, upside down, transpose
STORE_LIMIT = 32 * 2 ** 30  # bytes of pixels; a larger data set is streamed


class Patches:
    """Random training patches of the pictures at `paths`.

    patch_size: side of the HR patch, a multiple of scale. augment: "none", "flip" (mirror images)
    or "all" (the eight flips and rotations). crop_margin: the part of a picture's height and width,
    0 to below 0.5, that patches keep away from each border, as far as the picture is large enough.
    store: "always" decodes every picture once into a file of pixels under `cache`, "never" decodes
    them anew for each batch in worker processes, and "auto" takes the store while it is below
    32 GiB and half of the free disk. weights: how often each picture is drawn relative to the
    others, alike by default. What update number `step` sees depends on (seed, rank, step) alone,
    on every device. Pictures that are unreadable or smaller than a patch with its margin are left
    out, with a line on stderr; InputError where none is left.
    """

    def __init__(self, paths, patch_size=96, scale=4, kernel="bicubic", augment="all", crop_margin=0.0, device="cpu",
                 cache="cache", store="auto", weights=None, seed=0, rank=0):
        self.paths, self.scale, self.kernel, self.device = list(paths), scale, kernel, torch.device(device)
        self.codes, self.crop_margin, self.seed, self.rank = np.array(SYMMETRIES[augment]), crop_margin, seed, rank
        self.weights = np.ones(len(self.paths)) if weights is None else np.asarray(weights, float)
        self.start, self.size, self.pixels = _open_store(self.paths, cache, store)
        self.window = None
        self.resize(patch_size)
        if self.pixels is not None and self.device.type == "cuda" \
                and self.pixels.nbytes < torch.cuda.mem_get_info(self.device)[0] // 2:
            self.pixels = self.pixels.to(self.device)

    def resize(self, patch_size):
        """Go on with patches of another size."""
        if self.window == patch_size + 2 * MARGIN * self.scale:
            return
        self.window = patch_size + 2 * MARGIN * self.scale  # side of the HR crop that a patch is made from
        usable = (self.size >= self.window).all(1)
        if left_out := [str(p) for p, ok in zip(self.paths, usable) if not ok]:
            print(f"left out {len(left_out)} of {len(usable)} pictures, unreadable or smaller than "
                  f"{self.window}x{self.window}: {', '.join(left_out[:3])}{' ...' * (len(left_out) > 3)}", file=sys.stderr)
        self.chance = usable * self.weights
        if not self.chance.any():
            raise InputError(f"no picture is {self.window}x{self.window} or larger, which a patch of {patch_size} with "
                             "its margin needs; give larger pictures or a smaller patch_size")
        self.chance /= self.chance.sum()

    def _draw(self, step, n):
        """n random (picture, top, left, symmetry), the pictures distinct where there are enough: int64 [n, 4]."""
        rng = np.random.default_rng((self.seed, self.rank, step))
        distinct = np.count_nonzero(self.chance) >= n
        image = rng.choice(len(self.paths), n, replace=not distinct, p=self.chance)
        free = self.size[image] // self.scale - self.window // self.scale  # where a window may begin, on the LR grid: [n, 2]
        margin = np.minimum((self.crop_margin * self.size[image] / self.scale).astype(np.int64), free // 2)
        corner = (margin + (rng.random((n, 2)) * (free - 2 * margin + 1)).astype(np.int64)) * self.scale
        return np.column_stack([image, corner, rng.choice(self.codes, n)])

    def _gather(self, step, n):
        """Windows from the store: uint8 [n, window, window, 3] on the device that holds the pixels.

        A symmetry is where the index starts and how far, and which way, a step down or right takes it.
        """
        image, top, left, code = self._draw(step, n).T
        width, last = self.size[image, 1], self.window - 1
        mirrored, turned, transposed = code & 1 > 0, code & 2 > 0, code & 4 > 0
        first = self.start[image] + (top + turned * last) * width + left + mirrored * last
        down, right = np.where(turned, -width, width), np.where(mirrored, -1, 1)
        down, right = np.where(transposed, right, down), np.where(transposed, down, right)
        first, down, right = torch.from_numpy(np.stack([first, down, right])).to(
            self.pixels.device, non_blocking=True)[:, :, None, None]
        i = torch.arange(self.window, device=first.device)
        index = first + down * i.view(1, -1, 1) + right * i.view(1, 1, -1)  # [n, window, window]
        return self.pixels.index_select(0, index.flatten()).view(*index.shape, 3)

    def batches(self, n, first, last):
        """Yield (LR [n, 3, p/scale, p/scale] in [0, 1], HR [n, 3, p, p] in [-1, 1]) for updates first to last - 1."""
        if self.pixels is not None:
            windows = (self._gather(step, n) for step in range(first, last))
        else:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            windows = torch.utils.data.DataLoader(_Decoder(self, n), batch_size=None, sampler=range(first, last),
                                                  num_workers=cores, worker_init_fn=_ignore_signals,
                                                  pin_memory=self.device.type == "cuda")
        cut = MARGIN * self.scale
        for window in windows:
            if isinstance(window, Path):
                raise InputError(f"{window} and most other pictures cannot be read any more")
            if window.device.type == "cpu" and self.device.type == "cuda" and not window.is_pinned():
                window = window.pin_memory()  # so that the copy waits for nothing
            window = to_tensor(window.to(self.device, non_blocking=True))  # [n, 3, window, window]
            lr = downsample(window, self.scale, self.kernel)[:, :, MARGIN:-MARGIN, MARGIN:-MARGIN]
            hr = window[:, :, cut:-cut, cut:-cut] * 2 - 1
            yield (lr.contiguous(memory_format=torch.channels_last), hr.contiguous(memory_format=torch.channels_last))


def _ignore_signals(_):
    """In a worker process: a signal to all processes at once is for the main one to act on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Decoder(torch.utils.data.Dataset):
    """Windows of update `step`, decoded from the files: what a worker process of the DataLoader runs."""

    def __init__(self, patches, n):
        self.patches, self.n = patches, n

    def __getitem__(self, step):
        side, windows = self.patches.window, []
        retry = 2 ** 40  # beyond any step
        for draw in range(step, step + 10 * retry, retry):  # again only where a picture turns out to be broken
            for image, top, left, code in self.patches._draw(draw, self.n - len(windows)):
                path = self.patches.paths[image]
                try:
                    window = open_rgb(path)[top:top + side, left:left + side]
                    if window.shape != (side, side, 3):
                        raise InputError(f"{path}: not of the size that its header announces")
                except InputError as error:
                    print(error, file=sys.stderr)
                    continue
                window = window[:, ::-1] if code & 1 else window
                window = window[::-1] if code & 2 else window
                windows.append(window.swapaxes(0, 1) if code & 4 else window)
            if len(windows) == self.n:
                return torch.from_numpy(np.stack(windows))
        return path  # an exception would come out of the worker process as a traceback


def _read_size(path):
    """(height, width) of a picture as open_image would give it, from the file's header; (0, 0) where it is unreadable."""
    try:
        with open_within_limit(path) as image:
            exif = Image.Image.getexif(image)  # PNG's own would decode the whole picture
            turned = exif.get(0x0112, 1) >= 5 and image.format != "TIFF"  # 5 to 8 swap the sides; Pillow did so for TIFF
            return image.size if turned else image.size[::-1]
    except Exception:
        return 0, 0


def _parallel(function, items, title):
    pool = ThreadPoolExecutor()
    try:
        return list(tqdm(pool.map(function, items), title, len(items), unit="picture", disable=None))
    finally:
        pool.shutdown(cancel_futures=True)  # an interruption does not wait for what is queued


def _open_store(paths, cache, store):
    """All pictures' pixels end to end, in a file that is made on first use, and where each picture is in it.

    Gives start [n], in pixels; size [n, 2], height and width, 0 x 0 for what cannot be decoded; and
    the pixels, uint8 [all, 3], mapped from the file, or None where the pictures are to be streamed.
    The files' key is made of the pictures' paths, sizes and times. A file takes its name when it
    is complete, so one that was cut off half-way is made again.
    """
    def key():
        value = hashlib.sha256(b"1")  # the version of the format
        for path in paths:
            stat = os.stat(path)
            value.update(f"{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return value.hexdigest()[:20]

    name, cache = key(), Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    with lock(cache / f"{name}.lock"):  # a second process waits for the first, and finds its store
        remove_leftovers(cache)
        return _find_or_make_store(paths, cache / f"{name}.pixels", store, lambda: key() == name)


def _find_or_make_store(paths, file, store, unchanged):
    index, cache = file.with_suffix(".npy"), file.parent
    try:
        table = np.load(index)  # [n, 3]: start, height, width
        if table.shape != (len(paths), 3) or table.dtype != np.int64 or table.min() < 0:
            raise ValueError
    except (OSError, ValueError, EOFError):  # none, or a damaged one
        sizes = _parallel(_read_size, paths, "reading sizes")
        area = np.array(sizes, dtype=np.int64).prod(1)
        table = np.column_stack([np.cumsum(area) - area, sizes])
        file.unlink(missing_ok=True)
        _save_array(index, table)
    start, size = table[:, 0], table[:, 1:]
    total = max(int((start + size.prod(1)).max()), 1)
    if store == "never":
        return start, size, None
    if not file.exists() or file.stat().st_size < total * 3 or file.stat().st_size % 3:  # larger where the last picture is broken
        free = shutil.disk_usage(cache).free
        if store == "auto" and total * 3 > min(STORE_LIMIT, free // 2):
            print(f"{total * 3 / 2 ** 30:.1f} GiB of decoded pixels are too many to keep; decoding as they are needed",
                  file=sys.stderr)
            return start, size, None
        if total * 3 > free:
            raise InputError(f"{cache}: {total * 3 / 2 ** 30:.1f} GiB of decoded pixels do not fit in {free / 2 ** 30:.1f} GiB "
                             "of free disk; name another folder with --cache, or stream with --set store=never")
        with replacing(file) as temporary:
            with open(temporary, "wb") as reserved:  # a disk that fills up later would kill the process
                (getattr(os, "posix_fallocate", None) or (lambda fd, start, n: os.truncate(fd, n)))(reserved.fileno(), 0, total * 3)
            pixels = np.memmap(temporary, np.uint8, "r+", shape=(total, 3))

            def decode(i):
                try:
                    picture = open_rgb(paths[i])
                    pixels[start[i]:start[i] + size[i].prod()] = picture.reshape(-1, 3)
                    size[i] = picture.shape[:2]
                except ValueError:  # it is broken (InputError), or its header announced another size
                    size[i] = 0
            _parallel(decode, range(len(paths)), "decoding once")
            pixels.flush()
            if not unchanged():
                raise InputError("pictures of the training data changed while they were decoded; start again")
            _save_array(index, table)
    return start, size, torch.from_numpy(np.memmap(file, np.uint8, "c").reshape(-1, 3))  # "c": private, as torch wants it writable


def _save_array(path, array):
    with replacing(path) as temporary:
        np.save(temporary, array)


# ---------------------------------------------------------------------------------------------
# 3. Networks. Sec. 2.1 and Fig. 4, in the figure's notation: k kernel, n feature maps, s stride.
# ---------------------------------------------------------------------------------------------

def conv(n_in, n_out, k, s=1, bias=True):
    """k x k convolution, zeros around: [N, n_in, h, w] -> [N, n_out, h / s, w / s], rounded up."""
    return nn.Conv2d(n_in, n_out, k, s, k // 2, bias=bias)


class ResidualBlock(nn.Module):
    """k3n64s1, BN, PReLU, k3n64s1, BN, elementwise sum: [N, n, h, w] -> the same. No bias before BN, which would subtract it again."""
    radius, norm = 2, True  # pixels that a block sees to each side

    def __init__(self, n):
        super().__init__()
        self.body = nn.Sequential(conv(n, n, 3, bias=False), nn.BatchNorm2d(n), PReLU(),
                                  conv(n, n, 3, bias=False), nn.BatchNorm2d(n))

    def forward(self, x):
        return x + self.body(x)


class DenseBlock(nn.Module):
    """Wang et al. 2018, Fig. 4: five k3 convolutions that see all feature maps before them, LReLU between: [N, n, h, w] -> the same."""

    def __init__(self, n, growth=32):
        super().__init__()
        self.convs = nn.ModuleList(conv(n + i * growth, growth if i < 4 else n, 3) for i in range(5))

    def forward(self, x):                      # [N, 64, h, w]
        maps = x
        for layer in self.convs[:-1]:
            maps = torch.cat([maps, F.leaky_relu(layer(maps), 0.2)], 1)  # [N, 96 to 192, h, w]
        return x + 0.2 * self.convs[-1](maps)


class RRDB(nn.Module):
    """ESRGAN's residual-in-residual dense block, without batch norm (Wang et al. 2018, arXiv:1809.00219); no part of the paper."""
    radius, norm = 15, False

    def __init__(self, n):
        super().__init__()
        self.body = nn.Sequential(DenseBlock(n), DenseBlock(n), DenseBlock(n))

    def forward(self, x):
        return x + 0.2 * self.body(x)


BLOCKS = {"residual": ResidualBlock, "rrdb": RRDB}


class Generator(nn.Module):
    """G, Fig. 4 top: [N, 3, h, w] in [0, 1] -> [N, 3, scale h, scale w] in [-1, 1].

    1,547,350 parameters at scale 4; each PReLU has one slope, and convolutions before BN no bias
    (2,112 more with them). It starts as nearest-neighbour upsampling, from which it learns faster.
    block: "residual" is the paper's, "rrdb" ESRGAN's.
    """

    def __init__(self, scale=4, channels=64, n_blocks=16, block="residual"):
        super().__init__()
        self.arch = {"scale": scale, "channels": channels, "n_blocks": n_blocks, "block": block}  # saved with the weights
        Block = BLOCKS[block]
        n = channels
        self.head = nn.Sequential(conv(3, n, 9), PReLU())                                           # k9n64s1
        self.blocks = nn.Sequential(*[Block(n) for _ in range(n_blocks)])                           # B residual blocks
        self.fuse = nn.Sequential(conv(n, n, 3, bias=not Block.norm), *([nn.BatchNorm2d(n)] if Block.norm else []))  # k3n64s1, BN
        self.upsample = nn.Sequential(*[layer for _ in range(int(math.log2(scale))) for layer in (
            conv(n, 4 * n, 3), nn.PixelShuffle(2), PReLU())])                                       # k3n256s1, x2
        self.tail = conv(n, 3, 9)                                                                   # k9n3s1
        with torch.no_grad():  # G starts as nearest-neighbour upsampling: three channels carry RGB from end to end
            nn.init.dirac_(self.head[0].weight[:3])
            self.head[0].bias[:3] = 0
            for p in self.fuse[-1].parameters():
                nn.init.zeros_(p)
            for layer in self.upsample[::3]:
                nn.init.dirac_(layer.weight[:12:4])
                layer.bias[:12:4] = 0
                icnr_(layer)
            nn.init.dirac_(self.tail.weight).mul_(2.5)  # tanh(2.5 x - 1.25) takes [0, 1] nearly to [-1, 1]
            self.tail.bias.fill_(-1.25)

    def forward(self, lr):                     # [N, 3, h, w]
        return self.enlarge(self.features(lr))

    def features(self, lr):
        """Fig. 4 up to the long skip connection, at the size of LR: [N, 3, h, w] -> feature maps [N, channels, h, w]."""
        x = self.head(lr)                      # [N, 64, h, w]
        return x + self.fuse(self.blocks(x))   # [N, 64, h, w], the long skip connection

    def enlarge_as_drawn(self, x):
        """The rest of Fig. 4: feature maps [N, channels, h, w] -> SR [N, 3, scale h, scale w] in [-1, 1]."""
        x = self.tail(self.upsample(x))        # [N, 3, 4h, 4w]
        return torch.tanh(x.float())           # [-1, 1]

    def enlarge(self, x):
        """enlarge_as_drawn, faster: PReLU acts on each element alone, so the last shuffle may come after it and the tail (conv_of_shuffled)."""
        *layers, _, activation = self.upsample
        for layer in layers:
            x = layer(x)                       # [N, 256, 2h, 2w]
        x = conv_of_shuffled(activation(x), self.tail)
        return torch.tanh(x.float())

    @property
    def radius(self):
        """How many LR pixels away an SR pixel still sees: half of the receptive field, rounded up."""
        return 4 + sum(block.radius for block in self.blocks) + 1 + self.enlarge_radius  # 9x9, the blocks, 3x3

    @property
    def enlarge_radius(self):
        """How many LR pixels away `enlarge` sees."""
        steps = sum(0.5 ** i for i in range(int(math.log2(self.arch["scale"]))))  # 3x3 at 1, 1/2, 1/4 LR pixel
        return math.ceil(steps + 4 / self.arch["scale"])                          # 9x9 at the scale of SR


@torch.no_grad()
def icnr_(layer, r=2):
    """Initialise a sub-pixel convolution, weight [n r^2, c, k, k], as nearest-neighbour upsampling (Aitken et al., arXiv:1707.02937).

    The r^2 filters that PixelShuffle weaves into one feature map start alike, so no checkerboard pattern.
    """
    layer.weight.copy_(layer.weight[::r * r].repeat_interleave(r * r, dim=0))
    layer.bias.copy_(layer.bias[::r * r].repeat_interleave(r * r, dim=0))


NORMS = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}


class Discriminator(nn.Module):
    """D, Fig. 4 bottom: [N, 3, H, W] in [-1, 1] -> [N] logits. The sigmoid is part of the loss (Eq. 1).

    k3n64s1, LReLU, then k3 convolutions with BN and LReLU whose strides alternate between 2 and 1;
    dense 1024, LReLU, dense 1. Built for one patch_size: at 96 the dense layer sees 512 x 6 x 6 = 18432.
    Departures: first_kernel of another size; norm "instance" for a critic whose gradient penalty
    needs independent pictures; pool: average to pool x pool positions first, so that any patch fits.
    """

    def __init__(self, patch_size=96, channels=(64, 64, 128, 128, 256, 256, 512, 512), first_kernel=3, norm="batch", pool=0):
        super().__init__()
        layers = [conv(3, channels[0], first_kernel), nn.LeakyReLU(0.2, inplace=True)]  # k3n64s1
        for i, (n_in, n) in enumerate(zip(channels, channels[1:]), 1):          # n64s2 n128s1 n128s2 ... n512s2
            layers += [conv(n_in, n, 3, s=1 + i % 2, bias=False), NORMS[norm](n, affine=True), nn.LeakyReLU(0.2, inplace=True)]
        self.features = nn.Sequential(*layers, *([nn.AdaptiveAvgPool2d(pool)] if pool else []))
        side = pool or math.ceil(patch_size / 2 ** (len(channels) // 2))        # 96 -> 6
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(channels[-1] * side * side, 1024), nn.LeakyReLU(0.2),
                                        nn.Linear(1024, 1))

    def forward(self, x):                      # [N, 3, 96, 96]
        x = self.features(x)                   # [N, 512, 6, 6]
        return self.classifier(x).float().squeeze(1)


# What Fig. 4 draws, computed faster.

class PReLU(nn.PReLU):
    """PReLU with one slope: max(0, x) + a min(0, x). On the CPU its gradient takes half of the time that torch's takes."""

    def forward(self, x):
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _PReLUFunction.apply(x, self.weight)
        return super().forward(x)


class _PReLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a):
        ctx.save_for_backward(x, a)
        return F.leaky_relu(x, a.item())

    @staticmethod
    def backward(ctx, gradient):
        x, a = ctx.saved_tensors
        slope = x.clamp(max=0).mul_(gradient).sum((2, 3)).to(a.dtype).sum().view_as(a)  # summed in float32, not copied to it
        return torch.ops.aten.leaky_relu_backward(gradient, x, a.item(), False), slope


def conv_of_shuffled(x, layer, r=2):
    """layer(F.pixel_shuffle(x, r)), computed before the shuffle: [N, c r^2, h, w] -> [N, n, r h, r w].

    An SR pixel at one of the r^2 positions within an LR pixel sees fixed positions within the LR
    pixels around it. So the k x k weights on c feature maps, moved by the position and unshuffled,
    are weights on c r^2 maps: 9x9 with 64 -> 3 maps becomes 5x5 with 256 -> 12, which fills the
    vector units, and 3 large maps are shuffled instead of 64.
    """
    k, reach = layer.kernel_size[0], math.ceil(layer.padding[0] / r)  # reach in LR pixels
    side, weight = r * (2 * reach + 1), []     # the 9x9 weights move within 10x10
    for i in range(r):
        for j in range(r):
            top, left = (r * reach - layer.padding[0] + n for n in (i, j))
            moved = F.pad(layer.weight, (left, side - k - left, top, side - k - top))                # [3, 64, 10, 10]
            weight.append(F.pixel_unshuffle(moved, r))                                               # [3, 256, 5, 5]
    weight = torch.stack(weight, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)  # [12, 256, 5, 5]
    return F.pixel_shuffle(F.conv2d(x, weight, layer.bias.repeat_interleave(r * r), padding=reach), r)


VGG19_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"


class ContentNetwork(nn.Module):
    """A frozen ImageNet network up to one layer: [N, 3, H, W] in [-1, 1] -> feature maps phi, divided by `divisor`.

    Sec. 3.2 scales the feature maps by 1/12.75, which makes the content loss 0.006 of Eq. 5.
    weights: "imagenet" (torchvision's file, downloaded on first use), a path to a file in
    torchvision's layout, whole network or features alone, or "random" (seeded, for tests). Raises
    InputError where the weights cannot be had.
    """

    def __init__(self, features, weights, url, divisor):
        super().__init__()
        if weights == "random":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                for p in features.parameters():
                    nn.init.kaiming_normal_(p) if p.dim() > 1 else nn.init.zeros_(p)
        else:
            features.load_state_dict(_imagenet_state(features, weights, url))
        self.features, self.divisor = features.eval().requires_grad_(False), divisor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, x):
        return self.features(((x + 1) / 2 - self.mean) / self.std).float() / self.divisor


class TruncatedVGG19(ContentNetwork):
    """phi(i,j) of Eq. 5: VGG19 up to the j-th convolution, after its activation, before the i-th max-pooling.

    layer "2_2" is the paper's VGG22, "5_4" its VGG54: [N, 3, 96, 96] -> [N, 512, 6, 6]. See ContentNetwork.
    """

    layers = {f"{i}_{j}": (i, j) for i, depth in enumerate((2, 2, 4, 4, 4), 1) for j in range(1, depth + 1)}

    def __init__(self, layer="5_4", weights="imagenet", divisor=12.75):
        if layer not in self.layers:
            raise InputError(f"VGG19 has no layer {layer!r}; it has {' '.join(self.layers)}")
        layers, n_in = [], 3
        for name, (i, j) in self.layers.items():
            n = min(64 * 2 ** (i - 1), 512)
            layers += [nn.MaxPool2d(2)] * (j == 1 and i > 1) + [conv(n_in, n, 3), nn.ReLU(inplace=True)]
            n_in = n
            if name == layer:
                break
        super().__init__(nn.Sequential(*layers), weights, VGG19_URL, divisor)


class TruncatedSqueezeNet(ContentNetwork):
    """A light content network, no part of the paper: SqueezeNet 1.1 up to features[layer], a sixtieth of VGG19's work.

    layer 12 is the last: [N, 3, 96, 96] -> [N, 512, 5, 5]. See ContentNetwork.
    """

    layers = tuple(map(str, range(13)))

    def __init__(self, layer="12", weights="imagenet", divisor=12.75):
        from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1
        if layer not in self.layers:
            raise InputError(f"SqueezeNet 1.1 has no layer {layer!r}; it has 0 to 12")
        features = squeezenet1_1().features
        super().__init__(features[:int(layer) + 1], weights, SqueezeNet1_1_Weights.IMAGENET1K_V1.url, divisor)


CONTENT_NETWORKS = {"vgg19": TruncatedVGG19, "squeezenet1_1": TruncatedSqueezeNet}


def _imagenet_state(features, weights, url):
    """The part of a weights file in torchvision's layout that `features` needs, as float32."""
    if weights == "imagenet":
        try:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, check_hash=True)
        except Exception as error:  # no network, a cut-off download, another hash, a broken file in the cache
            raise InputError(f"cannot download {url} ({one_line(error)}); fetch it elsewhere and name it with "
                             "--vgg-weights PATH, or try things out with --vgg-weights random") from None
    else:
        state = load_checkpoint(weights)
    state = {key.removeprefix("features."): value for key, value in state.items() if isinstance(key, str) and is_plain(value)}
    missing = [key for key, value in features.state_dict().items()
               if key not in state or state[key].shape != value.shape]
    if missing:
        raise InputError(f"{weights}: holds no weights of this network (features.{missing[0]} is missing or has another shape)")
    return {key: state[key].float() for key in features.state_dict()}


# ---------------------------------------------------------------------------------------------
# 4. Losses. Sec. 2.2. Eq. 3: l^SR = l^SR_X + 1e-3 l^SR_Gen.
# ---------------------------------------------------------------------------------------------

PIXEL_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss}  # Eq. 4: mean over pixels of (I^HR - G(I^LR))^2


def content_loss(phi, sr, hr):
    """Eq. 5: (phi(I^HR) - phi(G(I^LR)))^2, [N, 3, H, W] in [-1, 1] twice -> scalar; the HR side carries no gradient.

    The mean over the pictures and feature maps, where Eq. 5 divides by the positions alone: so that
    the weight of this loss means the same for every layer and batch.
    """
    with torch.no_grad():
        target = phi(hr)
    return F.mse_loss(phi(sr), target)


def grid_loss(sr, hr, scale=4, window=8):
    """Mean over windows, colours and the scale^2 places in an LR pixel of |mean of SR - HR at that place|. Not of the paper.

    [N, 3, H, W] in [-1, 1] twice -> scalar; H and W are multiples of scale, window counts LR pixels.
    What G repeats in every LR pixel, and a wrong colour, stay in these means; texture leaves
    1/window of its strength. On plain areas such a grid is all that G can offer D, and Eq. 5 hardly
    sees it. A pattern whose period does not divide scale escapes to spectrum_loss.
    """
    error = F.pixel_unshuffle((sr - hr).contiguous(), scale)       # [N, 3 scale^2, H / scale, W / scale]
    side = [n // max(1, n // window) for n in error.shape[-2:]]    # of whole windows, as near to `window` as fits
    return F.avg_pool2d(error, side).abs().mean()


def _spectrum(x, window):
    """Amplitudes of every frequency in overlapping windows of x [N, 3, H, W]: [N, 3, rows, columns, window, window / 2 + 1]."""
    r, g, b = x.float().unbind(1)
    x = torch.stack([(r + g + b) / 3 ** 0.5, (r - b) / 2 ** 0.5, (r - 2 * g + b) / 6 ** 0.5], 1)  # orthonormal: coloured noise shows
    hann = torch.hann_window(window, periodic=False, device=x.device)
    hann = hann / hann.square().mean().sqrt()
    x = x.unfold(2, window, window // 2).unfold(3, window, window // 2)  # [N, 3, rows, columns, window, window]
    return torch.fft.rfft2(x * hann * hann[:, None], norm="ortho").abs()


def spectrum_loss(sr, hr, window=16):
    """Mean |amplitude of SR - amplitude of HR| over the frequencies of half-overlapping Hann windows. Not of the paper.

    [N, 3, H, W] in [-1, 1] twice -> scalar; the HR side carries no gradient. Amplitudes have the units
    of the pixels: white noise of deviation s has root mean square s at each frequency. Where a hair lies
    is not compared: other hairs of the same kind cost 0.6 of what a blur costs, a regular pattern of the
    same energy more than the blur. Cheapest is texture of 3/4 of the strength; the rest is D's to ask for.
    """
    window = min(window, *hr.shape[-2:])
    with torch.no_grad():
        target = _spectrum(hr, window)
    return (_spectrum(sr, window) - target).abs().mean()


def stationarity_loss(sr, hr, scale=4):
    """How much SR's texture depends on the place within an LR pixel, as no photo's does. Not of the paper.

    [N, 3, H, W] in [-1, 1] twice -> scalar; H and W are multiples of scale, HR carries no gradient.
    Grey detail (less its 5x5 mean) is divided by the root of HR's strength around it. The mean product
    of two of the scale^2 places, over all LR pixels of the batch, in units of HR's mean square, should
    depend on how they lie to each other alone: mean |difference from the mean of all that lie alike|.
    HR itself costs what chance leaves, 0.01 for 16 patches of 96 pixels, and a blur nothing. Dots of either
    sign in rows cost, which grid_loss does not see; places of two LR pixels are not compared, nor colours.
    """
    def detail(x):                             # [N, 3, H, W] -> [N, scale^2, H / scale, W / scale]
        x = x.float().mean(1, keepdim=True)
        return F.pixel_unshuffle(x - F.avg_pool2d(x, 5, 1, 2, count_include_pad=False), scale)

    with torch.no_grad():
        target = detail(hr)
        strength = F.avg_pool2d(target.square().mean(1, keepdim=True), 7, 1, 3, count_include_pad=False).sqrt()
        weight = (strength + 0.01).rsqrt()     # 0.01, about a grey level, bounds what flat areas weigh
        unit = (weight * target).square().mean().clamp(min=1e-3)
    x = (weight * detail(sr)).transpose(0, 1).flatten(1)  # [scale^2, N H W / scale^2]
    with torch.autocast(x.device.type, enabled=False):
        product = (x @ x.T / (x.shape[1] * unit)).flatten()
    place = torch.arange(scale * scale, device=sr.device)
    place = place // scale * 2 * scale + place % scale
    lie = (place[:, None] - place).flatten() + 2 * scale * scale
    mean = product.new_zeros(4 * scale * scale).scatter_reduce(0, lie, product, "mean", include_self=False)
    return (product - mean[lie]).abs().mean()


def adversarial_loss(fake, real=None):
    """Eq. 6: mean of -log D(G(I^LR)), from logits [N] to a scalar: -log sigmoid(x) = softplus(-x). `real` is for others of its kind."""
    return F.softplus(-fake).mean()


def discriminator_loss(fake, real):
    """Eq. 1, for D to minimise: -log D(I^HR) - log(1 - D(G(I^LR))), from logits [N]."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def wasserstein_adversarial_loss(fake, real=None):
    """Gulrajani et al. 2017, arXiv:1704.00028: G raises the critic's score of what it makes."""
    return -fake.mean()


def wasserstein_discriminator_loss(fake, real):
    """Gulrajani et al. 2017, Eq. 3 without its penalty: the critic parts the scores of HR and SR."""
    return fake.mean() - real.mean()


def relativistic_adversarial_loss(fake, real):
    """Wang et al. 2018, Eq. 2: SR is to look more real than the average HR, and HR less real than the average SR."""
    return discriminator_loss(real - fake.mean(), fake - real.mean())


def relativistic_discriminator_loss(fake, real):
    """Wang et al. 2018, Eq. 1: the reverse of relativistic_adversarial_loss."""
    return discriminator_loss(fake - real.mean(), real - fake.mean())


ADVERSARIAL_LOSSES = {  # name: the generator's and the discriminator's, functions of D(SR) and D(HR), logits or scores [N]
    "bce": (adversarial_loss, discriminator_loss),
    "wasserstein": (wasserstein_adversarial_loss, wasserstein_discriminator_loss),
    "relativistic": (relativistic_adversarial_loss, relativistic_discriminator_loss),
}


def _gradient(critic, x):
    """The gradient of each picture's score, or of the sum of all where batch norm mixes them: [N, 3, H, W] -> [N, 3 H W]."""
    x = x.detach().requires_grad_()
    gradient, = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return gradient.flatten(1)


def gradient_penalty(critic, sr, hr, mix):
    """Gulrajani et al. 2017, Eq. 3: mean of (|grad D(x)| - 1)^2 at x = mix SR + (1 - mix) HR, mix [N] uniform in [0, 1]."""
    return (_gradient(critic, torch.lerp(hr, sr, mix.view(-1, 1, 1, 1))).norm(dim=1) - 1).square().mean()


def r1_penalty(discriminator, hr):
    """Mescheder et al. 2018, arXiv:1801.04406, Eq. 9 without gamma / 2: mean of |grad D(x)|^2 over the HR pictures x [N, 3, H, W]."""
    return _gradient(discriminator, hr).square().sum(1).mean()


# ---------------------------------------------------------------------------------------------
# 5. Metrics. Sec. 3.1: "on the y-channel of center-cropped, removal of a 4-pixel wide strip from
#    each border". 8-bit pictures, float64 arithmetic.
# ---------------------------------------------------------------------------------------------

def _planes(picture, shave, luma):
    """Picture(s) as psnr takes them -> float64 [..., 1 or 3, H - 2 shave, W - 2 shave] in [0, 255]."""
    if isinstance(picture, np.ndarray):
        picture = torch.from_numpy(np.array(picture)).movedim(-1, -3)
    elif picture.is_floating_point():
        picture = to_pixels(picture).movedim(-1, -3)  # the protocol compares what would be saved
    if picture.dtype != torch.uint8 or picture.dim() < 3 or picture.shape[-3] != 3:
        raise ValueError(f"expected uint8 [H, W, 3] arrays or [..., 3, H, W] tensors, not {picture.dtype} {tuple(picture.shape)}")
    h, w = picture.shape[-2:]
    if min(h, w) <= 2 * shave:
        raise InputError(f"nothing is left of {h}x{w} after {shave} pixels from each border")
    x = picture[..., shave:h - shave, shave:w - shave].double()
    if luma:  # ITU-R BT.601, studio swing: Y in [16, 235]
        x = 16 + (65.481 * x[..., 0:1, :, :] + 128.553 * x[..., 1:2, :, :] + 24.966 * x[..., 2:3, :, :]) / 255
    return x


def _pair(sr, hr, shave, luma):
    if sr.shape != hr.shape:
        raise ValueError(f"pictures of two sizes: {tuple(sr.shape)} and {tuple(hr.shape)}")
    return _planes(sr, shave, luma), _planes(hr, shave, luma)


def psnr(sr, hr, shave=4, luma=True):
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / MSE); inf for identical pictures.

    Two uint8 arrays [H, W, 3] -> float. Two tensors [..., 3, H, W], uint8 or float in [-1, 1] (which
    are rounded to 8 bits first) -> float64 tensor [...]. shave: pixels removed from each border.
    luma: on Y of BT.601 rather than on RGB. Raises ValueError for sizes that differ or vanish.
    """
    x, y = _pair(sr, hr, shave, luma)
    value = 10 * torch.log10(255 ** 2 / ((x - y) ** 2).mean((-3, -2, -1)))
    return value.item() if isinstance(sr, np.ndarray) else value


def ssim(sr, hr, shave=4, luma=True):
    """Structural similarity of Wang et al., IEEE TIP 2004, in [-1, 1]; arguments and errors of psnr.

    11x11 Gaussian window of sigma 1.5, where it lies inside the picture; K1 0.01, K2 0.03, L 255.
    """
    x, y = _pair(sr, hr, shave, luma)
    if min(x.shape[-2:]) < 11:
        raise InputError("SSIM needs 11x11 pixels inside the shaved border")
    window = torch.arange(-5, 6, dtype=torch.float64, device=x.device)
    window = torch.softmax(-window ** 2 / (2 * 1.5 ** 2), dim=0)

    def mean(z):  # local mean under the window, rows then columns
        z = F.conv2d(z.reshape(-1, 1, *z.shape[-2:]), window.view(1, 1, -1, 1))
        return F.conv2d(z, window.view(1, 1, 1, -1))

    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mu_x ** 2, mean(y * y) - mu_y ** 2, mean(x * y) - mu_x * mu_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x ** 2 + mu_y ** 2 + c1) * (var_x + var_y + c2))
    value = similarity.view(*x.shape[:-2], -1).mean((-2, -1))
    return value.item() if isinstance(sr, np.ndarray) else value


def measure(sr, hr, shave=4, luma=True, lpips=None):
    """{"psnr", "ssim", "lpips"} of two uint8 arrays [H, W, 3]; lpips: a function that load_lpips gave, or None."""
    return {"psnr": psnr(sr, hr, shave, luma), "ssim": ssim(sr, hr, shave, luma), "lpips": lpips and lpips(sr, hr)}


def aggregate(scores):
    """A list of what measure gave -> {metric: {"mean", "std"} over the pictures, or None where it was not measured}."""
    def summary(values):
        if None in values:
            return None
        return {"mean": float(np.mean(values)), "std": float(np.std(values)) if np.isfinite(values).all() else math.nan}
    return {metric: summary([score[metric] for score in scores]) for metric in scores[0]}


ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


def load_lpips(device="cpu"):
    """LPIPS of Zhang et al., CVPR 2018 (AlexNet, version 0.1), as a function of two uint8 arrays [H, W, 3] -> float.

    Whole RGB pictures, lower is better. Downloads AlexNet's weights on first use; raises InputError
    where they or the package lpips cannot be had.
    """
    try:
        import lpips
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torchvision, for how lpips asks it for AlexNet
            network = lpips.LPIPS(net="alex", verbose=False).to(device)
    except Exception as error:  # no package, no network, a cut-off download, another hash, a broken file in the cache
        raise InputError(f"LPIPS is not available ({one_line(error)}); fetch {ALEXNET} elsewhere and put it into "
                         f"{torch.hub.get_dir()}/checkpoints, or leave LPIPS out") from None

    @torch.inference_mode()
    def distance(sr, hr):
        if min(hr.shape[:2]) < 32:
            raise InputError("LPIPS needs 32x32 pixels; leave it out for smaller pictures")
        x, y = (to_tensor(p)[None].to(device) * 2 - 1 for p in (sr, hr))
        return network(x, y).item()
    return distance


def try_lpips(device="cpu"):
    """What load_lpips gives, or None, with a line on stderr that says why."""
    try:
        return load_lpips(device)
    except InputError as error:
        print(f"{error}; going on without it", file=sys.stderr)


# ---------------------------------------------------------------------------------------------
# 6. Upscaling. A pixel of SR depends on LR pixels no further away than the generator's radius, so
#    tiles that overlap by it, cut back to their own part, are the untiled result. The feature maps
#    of the residual blocks see far and take little memory, the enlarged ones see 3 LR pixels and
#    take much: so the former come in large tiles, and each of these is enlarged in small parts.
# ---------------------------------------------------------------------------------------------

TILE = 1448  # LR pixels, 2 megapixels: with the overlap, 2 GB of float32 feature maps
PART = 128   # LR pixels of a tile that are enlarged at once


def optimize_for_inference(generator):
    """A copy of a generator, the same function: batch norms become part of the convolutions before them, PReLU works in place."""
    generator = copy.deepcopy(generator).eval().requires_grad_(False)
    for body in generator.head, generator.fuse, generator.upsample, *[block.body for block in generator.blocks]:
        for i, layer in enumerate(body):
            if isinstance(layer, nn.BatchNorm2d):
                body[i - 1], body[i] = nn.utils.fuse_conv_bn_eval(body[i - 1], layer), nn.Identity()
            elif isinstance(layer, nn.PReLU):
                body[i] = nn.LeakyReLU(layer.weight.item(), inplace=True)
    return generator


def _tiles(top, bottom, left, right, side):
    """The rectangle in equal parts of at most side x side: [(top, bottom, left, right)]."""
    rows, columns = (np.linspace(a, b, math.ceil((b - a) / side) + 1).astype(int) for a, b in ((top, bottom), (left, right)))
    return [(t, b, l, r) for t, b in zip(rows, rows[1:]) for l, r in zip(columns, columns[1:])]


OUT_OF_MEMORY = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc", "create a memory object")


def is_out_of_memory(error):
    """Whether an exception says so, in the words of torch, CUDA, cuDNN, cuBLAS or oneDNN."""
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


@torch.inference_mode()
def upscale(generator, image, tile=None, ensemble=False, precision="fp32", progress=False):
    """Super-resolve pictures: uint8 [h, w, 3] -> uint8 [scale h, scale w, 3], or several of one size, [N, h, w, 3].

    tile: side in LR pixels of the parts that are computed one at a time, 0 for the whole picture at
    once; by default TILE (half at scale 8). It bounds the memory and does not change the result. Where
    the memory is too small all the same, tiles are halved, down to 16 (then the error comes through).
    ensemble: mean over the eight flips and rotations. precision: see autocast. progress: a bar over the
    pixels.
    """
    *n, h, w, _ = image.shape
    scale, radius = generator.arch["scale"], generator.radius
    device = next(generator.parameters()).device
    out = np.empty((*n, h * scale, w * scale, 3), np.uint8)
    tile = TILE * 4 // max(4, scale) if tile is None else tile or max(h, w)

    def compute(t, b, l, r):
        t0, l0 = max(t - radius, 0), max(l - radius, 0)
        lr = to_tensor(np.ascontiguousarray(image[..., t0:b + radius, l0:r + radius, :]))
        lr = lr.view(-1, *lr.shape[-3:]).to(device, memory_format=torch.channels_last)
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if precision == "fp32" else nullcontext()
        with autocast(device, precision), exact:
            sr = (_ensemble if ensemble else _enlarge_in_parts)(generator, lr)
        sr = sr[..., (t - t0) * scale:(b - t0) * scale, (l - l0) * scale:(r - l0) * scale]
        out[..., t * scale:b * scale, l * scale:r * scale, :] = to_pixels(sr).cpu().numpy().reshape(
            *n, (b - t) * scale, (r - l) * scale, 3)

    tiles = _tiles(0, h, 0, w, tile)
    with tqdm(total=h * w, unit="px", unit_scale=True, leave=False, disable=not progress or len(tiles) == 1) as bar:
        while tiles:
            t, b, l, r = tiles[0]
            try:
                compute(t, b, l, r)
            except (RuntimeError, MemoryError) as error:
                side = max(b - t, r - l) // 2
                if not is_out_of_memory(error) or side < 16:
                    raise
            else:
                side = None
                bar.update((b - t) * (r - l))
            tiles = [part for whole in tiles for part in _tiles(*whole, side)] if side else tiles[1:]
    return out


def _enlarge_in_parts(generator, lr):
    """G(lr), the feature maps at once, the enlargement in parts: [N, 3, h, w] -> [N, 3, scale h, scale w]."""
    (n, _, h, w), scale, radius = lr.shape, generator.arch["scale"], generator.enlarge_radius
    features, sr = generator.features(lr), lr.new_empty(n, 3, h * scale, w * scale)
    for t, b, l, r in _tiles(0, h, 0, w, PART):
        t0, l0 = max(t - radius, 0), max(l - radius, 0)
        part = generator.enlarge(features[:, :, t0:b + radius, l0:r + radius])
        sr[:, :, t * scale:b * scale, l * scale:r * scale] = part[
            :, :, (t - t0) * scale:(b - t0) * scale, (l - l0) * scale:(r - l0) * scale]
    return sr


def _ensemble(generator, lr):
    """Mean of G over the eight symmetries of the square, each undone after G."""
    total = 0
    for turns in range(4):
        for mirrored in (False, True):
            sr = torch.rot90(lr.flip(3) if mirrored else lr, turns, (2, 3))
            sr = torch.rot90(_enlarge_in_parts(generator, sr), -turns, (2, 3))
            total = total + (sr.flip(3) if mirrored else sr)
    return total / 8


def pick_device(name="auto"):
    """"auto" (the first CUDA GPU, else the CPU) or any device that torch names. Raises InputError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # torch raises exceptions of several types for devices that are unknown or absent
        raise InputError(f"device {name!r} cannot be used ({one_line(error)}); take cpu, cuda or cuda:1") from None
    return device


def pick_precision(device, name="auto"):
    """"bf16" or "fp32" as named; for "auto", bf16 where the device computes in it: newer GPUs, CPUs with AVX512-BF16 or AMX."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native and device.type == "cpu" else "fp32"


def autocast(device, precision):
    """The context that networks run in: "fp32" or "bf16" (convolutions; weights, losses and results stay float32)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# ---------------------------------------------------------------------------------------------
# 7. Checkpoints. A dictionary of tensors, numbers and strings: "generator" (the state of its
#    exponential moving average, which is the result), "arch" (its arguments), and what train.py adds.
# ---------------------------------------------------------------------------------------------

def float_state(network):
    """Parameters and batch-norm statistics alike, as a list of tensors."""
    return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]


@torch.no_grad()
def ema_(average, current, decay):
    """average <- decay average + (1 - decay) current, in place; both as float_state gives them."""
    torch._foreach_lerp_(average, current, 1 - decay)


@contextmanager
def replacing(path):
    """A temporary path beside `path` to write to; it takes the place of `path` on success and vanishes on failure."""
    path = Path(os.path.realpath(path))  # a link stays one
    if path.exists() and not path.is_file():
        yield path  # a device or a pipe
        return
    temporary = path.with_name(f".{os.getpid()}.{threading.get_ident()}{path.suffix}")  # however long the name
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder):
    """Remove the temporary files of `replacing` whose process is no more."""
    if os.name == "nt":  # there os.kill ends processes, or their console's
        return
    for path in Path(folder).glob(".*"):
        if match := re.fullmatch(r"\.(\d+)\.\d+\.\w+", path.name):
            try:
                os.kill(int(match[1]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except (OSError, OverflowError):
                pass  # another user's


def replacing_text(path, text):
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def lock(path, busy=None):
    """A file that one process at a time may hold open; the system lets go of it when the process ends, however it ends.

    Waits for another process, or raises InputError with the message `busy`. Without fcntl (Windows) nothing is locked.
    """
    try:
        import fcntl
    except ImportError:
        return nullcontext()
    file = open(path, "w")
    try:
        if busy:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # worker processes do not inherit it
        else:
            fcntl.flock(file, fcntl.LOCK_EX)                  # threads wait, too
    except (BlockingIOError, PermissionError):
        file.close()
        raise InputError(busy) from None
    return file


def save_checkpoint(path, generator, **more):
    """Write `generator`'s weights and arguments, and whatever else is given, at once or not at all."""
    with replacing(path) as temporary:
        try:
            torch.save({"generator": generator.state_dict(), "arch": generator.arch, **more}, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())  # a power cut finds the old file or the new one
        except RuntimeError as error:  # what torch.save makes of a full disk
            raise InputError(f"{path}: cannot be written ({one_line(error)}); is the disk full?") from None


def load_checkpoint(path, device="cpu"):
    """A dictionary that torch.save wrote; nothing in the file is executed. Raises InputError where it is none."""
    check_file(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.save does not compress: what is packed grows without bounds
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("compressed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles, which either load or do not
            state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # torch.load raises exceptions of many types on files of other kinds
        raise InputError(f"{path}: no checkpoint of plain tensors ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: no checkpoint but a {type(state).__name__}")
    return state


def is_plain(value):
    """Whether a checkpoint's entry is a tensor of numbers that are in the file."""
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout == torch.strided and not value.is_complex()


def load_generator(path, device="cpu"):
    """The Generator of any checkpoint that train.py wrote, in eval mode, float32. Raises InputError."""
    state = load_checkpoint(path)
    if not {"generator", "arch"} <= state.keys():
        raise InputError(f"{path}: no checkpoint of train.py (it has no generator and arch)")
    arch, weights = state["arch"], state["generator"]
    try:
        if not (arch.keys() <= {"scale", "channels", "n_blocks", "block"} and all(type(value) in (int, str) for value in arch.values())):
            raise ValueError("unknown arguments")
        if arch["scale"] not in SCALES or not 0 <= arch["n_blocks"] <= len(weights) or not 3 <= arch["channels"] <= 2 ** 16:
            raise ValueError(f"{arch}")
        if not all(map(is_plain, weights.values())) or sum(t.nbytes for t in weights.values()) > os.path.getsize(path):
            raise ValueError("its weights are no tensors, or more than the file holds")
        with torch.device("meta"):  # takes no memory: only what the file holds is allocated
            expected = Generator(**arch).state_dict()
        if [(key, value.shape) for key, value in weights.items()] != [(key, value.shape) for key, value in expected.items()]:
            raise ValueError(f"its weights are not those of {arch}")
        generator = Generator(**arch)
        generator.load_state_dict(weights)
    except Exception as error:  # arguments or weights of whatever kind
        raise InputError(f"{path}: holds a generator of another architecture ({one_line(error)})") from None
    if not all(tensor.isfinite().all() for tensor in generator.state_dict().values()):
        raise InputError(f"{path}: its weights are not finite; the training diverged, take an earlier checkpoint")
    return generator.to(device, memory_format=torch.channels_last).eval()


def run(main):
    """Call a script's main and exit with its status; what a person can put right is one line and exit status 2."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda n, _: sys.exit(128 + n))  # so that what is half-written is removed
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold anything
    try:
        status = main()
    except (InputError, OSError) as error:
        status = f"{error}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        status = "out of memory; take a smaller --tile or --batch-size"
    except KeyboardInterrupt:
        sys.exit(130)
    if isinstance(status, str):
        say(f"{Path(sys.argv[0]).name}: {status}")
        status = 2
    sys.exit(status)
