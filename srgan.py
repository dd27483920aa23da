"""SRGAN, to be read beside the paper: Ledig et al., "Photo-Realistic Single Image Super-Resolution
Using a Generative Adversarial Network", CVPR 2017, arXiv:1609.04802.

The paper
    1. Networks           generator and discriminator                   Sec. 2.1, Fig. 4
    2. Losses             pixel, content, adversarial, perceptual       Sec. 2.2, Eq. 3 to 6
    3. Training           one update of D and of G, alternating         Eq. 1 and 2, Sec. 3.2
What surrounds it
    4. Data               open images, make LR from HR, draw patches    Sec. 3.2
    5. Metrics            PSNR, SSIM, LPIPS                             Sec. 3.1
    6. Upscaling          whole images, in tiles that leave no trace
    7. Checkpoints        what train.py writes and every script reads
    8. Beyond the paper   initialisation, networks, losses, updates
    9. Speed              the same mathematics, computed faster

Sections 1 to 3 are the paper, and say where they add to it. Symbols: G, D, LR, HR, SR = G(LR).

Images are RGB. Tensors are float32 [N, 3, height, width]; LR is in [0, 1], HR and SR are in
[-1, 1] (Sec. 3.2). Outside of tensors, images are uint8 arrays [height, width, 3].
"""
# Sections 1 to 3 need only torch and math; the rest serves what surrounds them.
import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import timeit
import warnings
from collections import deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock  # comes with torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from tqdm import tqdm


# ==================================================================================================
# 1. Networks. Sec. 2.1 and Fig. 4, in its notation: k9n64s1 is a convolution with a kernel of 9x9,
#    64 feature maps and stride 1.
# ==================================================================================================

class ResidualBlock(nn.Module):
    """Fig. 4: k3n64s1, BN, PReLU, k3n64s1, BN, elementwise sum. [N, n, h, w] -> [N, n, h, w]."""

    def __init__(self, n=64):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(n, n, 3, padding=1, bias=False),            # k3n64s1; BN has the bias
            nn.BatchNorm2d(n),
            nn.PReLU(),                                           # one slope for all maps
            nn.Conv2d(n, n, 3, padding=1, bias=False),            # k3n64s1
            nn.BatchNorm2d(n))

    def forward(self, x):
        return x + self.body(x)                                   # elementwise sum


class Generator(nn.Module):
    """G, Fig. 4 top: LR [N, 3, h, w] in [0, 1] -> SR [N, 3, scale h, scale w] in [-1, 1].

    1,547,350 parameters at scale 4; `scale` is 2, 4 or 8. tanh: whether SR is kept in [-1, 1] by a
    Tanh, which the paper does not mention and nearly every implementation has.
    """
    block = "residual"                                            # its name in section 8's table

    def __init__(self, scale=4, channels=64, n_blocks=16, tanh=True):
        super().__init__()
        self.arch = {"scale": scale, "channels": channels, "n_blocks": n_blocks, "tanh": tanh,
                     "block": self.block}                         # saved with the weights
        n = channels
        self.head = nn.Sequential(
            nn.Conv2d(3, n, 9, padding=4), nn.PReLU())            # k9n64s1, PReLU
        self.blocks = nn.Sequential(
            *[ResidualBlock(n) for _ in range(n_blocks)])         # B residual blocks
        self.fuse = nn.Sequential(
            nn.Conv2d(n, n, 3, padding=1, bias=False), nn.BatchNorm2d(n))       # k3n64s1, BN
        self.upsample = nn.Sequential()
        for _ in range(int(math.log2(scale))):
            self.upsample.extend([
                nn.Conv2d(n, 4 * n, 3, padding=1), nn.PixelShuffle(2), nn.PReLU()])  # k3n256s1
        self.tail = nn.Conv2d(n, 3, 9, padding=4)                 # k9n3s1
        self.output = nn.Tanh() if tanh else nn.Identity()

    def forward(self, lr):                                        # [N, 3, h, w] in [0, 1]
        x = self.head(lr)                                         # [N, 64, h, w]
        x = x + self.fuse(self.blocks(x))                         # [N, 64, h, w], long skip
        x = self.upsample(x)                                      # [N, 64, 4h, 4w]
        return self.output(self.tail(x))                          # [N, 3, 4h, 4w] in [-1, 1]


class Discriminator(nn.Module):
    """D, Fig. 4 bottom: [N, 3, H, W] in [-1, 1] -> logits [N]. Its sigmoid is part of the losses.

    Built for one patch_size: at 96, the dense layers see 512 x 6 x 6 = 18,432 features. Beyond the
    paper (section 8) are other `channels`, a `first_kernel` that is not 3, norm="instance", and
    `pool`, which averages the features to pool x pool positions so that any patch size fits.
    """

    def __init__(self, patch_size=96, channels=(64, 64, 128, 128, 256, 256, 512, 512),
                 first_kernel=3, norm="batch", pool=0):
        super().__init__()
        layers = [nn.Conv2d(3, channels[0], first_kernel, padding=first_kernel // 2),
                  nn.LeakyReLU(0.2)]                              # k3n64s1, LeakyReLU
        for i, (n_in, n) in enumerate(zip(channels, channels[1:])):
            stride = 1 if i % 2 else 2                            # n64s2 n128s1 n128s2 ... n512s2
            layers += [nn.Conv2d(n_in, n, 3, stride, padding=1, bias=False),
                       NORMS[norm](n, affine=True), nn.LeakyReLU(0.2)]
        if pool:
            layers.append(nn.AdaptiveAvgPool2d(pool))
        self.features = nn.Sequential(*layers)
        side = pool or math.ceil(patch_size / 2 ** (len(channels) // 2))       # 96 -> 6
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(channels[-1] * side * side, 1024),         # dense 1024
            nn.LeakyReLU(0.2), nn.Linear(1024, 1))                             # dense 1

    def forward(self, x):                                         # [N, 3, 96, 96] in [-1, 1]
        x = self.features(x)                                      # [N, 512, 6, 6]
        return self.classifier(x).squeeze(1)                      # [N]


# ==================================================================================================
# 2. Losses. Sec. 2.2, Eq. 3 to 6. Where the paper sums, these are means: see each docstring.
# ==================================================================================================

def mse_loss(sr, hr):
    """Eq. 4, l_MSE: mean over pixels of (HR - SR)^2. [N, 3, H, W] in [-1, 1] twice -> scalar.

    The mean includes the three colours, which Eq. 4 does not mention.
    """
    return (hr - sr).square().mean()                              # Eq. 4


class ContentNetwork(nn.Module):
    """A frozen network's feature maps phi: [N, 3, H, W] in [-1, 1] -> [N, C, h, w].

    Sec. 3.2 scales the feature maps by 1/12.75 and thereby Eq. 5 by its square, about 0.006.
    The input is normalised as torchvision's networks expect it.
    """

    def __init__(self, features, divisor=12.75):
        super().__init__()
        self.features = features.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
        self.register_buffer("divisor", torch.tensor(divisor).view(1, 1, 1))

    def forward(self, x):
        x = ((x + 1) / 2 - self.mean) / self.std
        return self.features(x) / self.divisor


class TruncatedVGG19(ContentNetwork):
    """phi(i,j) of Eq. 5: VGG19's j-th convolution, after its activation, before the i-th pooling.

    layer: "2_2" is the paper's VGG22, "5_4" its VGG54: [N, 3, 96, 96] -> [N, 512, 6, 6].
    weights: "imagenet" (torchvision's, downloaded on first use), a file in torchvision's layout
    that holds at least the layers needed, or "random" (seeded, for tests). Raises InputError.
    weights/README.md says which VGG19 the divisor 12.75 suits.
    """
    layers = ("1_1", "1_2", "2_1", "2_2", "3_1", "3_2", "3_3", "3_4",
              "4_1", "4_2", "4_3", "4_4", "5_1", "5_2", "5_3", "5_4")

    def __init__(self, layer="5_4", weights="imagenet", divisor=12.75):
        modules, n_in = [], 3
        for name in self.layers[:self.layers.index(layer) + 1]:
            i, j = map(int, name.split("_"))
            n = min(32 * 2 ** i, 512)                             # 64, 128, 256, 512, 512
            if i > 1 and j == 1:
                modules.append(nn.MaxPool2d(2))
            modules += [nn.Conv2d(n_in, n, 3, padding=1), nn.ReLU()]
            n_in = n
        super().__init__(load_features(nn.Sequential(*modules), weights, VGG19_URL), divisor)


def content_loss(phi, sr, hr):
    """Eq. 5, l_VGG/i,j: mean of (phi(HR) - phi(SR))^2. [N, 3, H, W] in [-1, 1] twice -> scalar.

    The mean includes the feature maps, so that a weight means the same for every layer. Eq. 5
    divides by the number of positions only: summed over the feature maps, it would be 128 times
    this value for VGG22 and 512 times for VGG54.
    """
    return (phi(hr) - phi(sr)).square().mean()                    # Eq. 5


def total_variation(sr):
    """Sec. 3.4: SRResNet-VGG22 adds it to VGG22 with weight 2e-8. [N, 3, H, W] -> scalar.

    The paper gives neither norm nor scale. Here, the absolute differences between neighbouring
    pixels are summed over each image and averaged over the batch. For photos, 2e-8 times this sum
    is about half a per cent of the content loss; 2e-8 times a mean over pixels would be nothing.
    """
    down, right = sr.diff(dim=2), sr.diff(dim=3)
    return (down.abs().sum() + right.abs().sum()) / len(sr)


def adversarial_loss(D, sr, hr=None):
    """Eq. 6, l_Gen: -log D(SR), here the mean over the batch instead of its sum. -> scalar

    Eq. 2 would have G minimise log(1 - D(SR)); -log D(SR) has better gradients (Sec. 2.2.2). D
    returns logits x, and -log(sigmoid(x)) = softplus(-x). Only relativistic losses use `hr`.
    """
    return F.softplus(-D(sr)).mean()                              # Eq. 6


def perceptual_loss(content, adversarial, weight=1e-3):
    """Eq. 3, l^SR: content loss (Eq. 4 or 5) and adversarial loss (Eq. 6). Scalars -> scalar."""
    return content + weight * adversarial                         # Eq. 3


# ==================================================================================================
# 3. Training. SRResNet minimises a content loss alone: Eq. 1, where l^SR is Eq. 4 (or 5). SRGAN
#    starts from it and plays the game of Eq. 2, where G minimises the perceptual loss of Eq. 3.
# ==================================================================================================

def discriminator_loss(fake, real):
    """D's side of Eq. 2, negated to be minimised: -log D(HR) - log(1 - D(SR)). -> scalar

    Logits [N]: fake = D(SR), real = D(HR); -log(1 - sigmoid(x)) = softplus(x).
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()     # Eq. 2, max over D


class Update:
    """One update of D and then of G (Sec. 3.2 alternates, k = 1); without a D, of G alone.

    content_losses: {name: (weight, function of SR and HR)}; the paper has one, SRResNet-VGG22 two.
    penalties: the same for D's loss; the paper has none. Section 8 has some, and other adversarial
    losses. Call it with LR [N, 3, h, w] in [0, 1] and HR [N, 3, 4h, 4w] in [-1, 1]. It returns
    {name: scalar}: G's losses, unweighted; "loss", their weighted sum; D's loss and mean logits.
    """

    def __init__(self, G, adam_G, content_losses, D=None, adam_D=None, adversarial_weight=1e-3,
                 adversarial_loss=adversarial_loss, discriminator_loss=discriminator_loss,
                 penalties=None):
        self.G, self.adam_G, self.D, self.adam_D = G, adam_G, D, adam_D
        self.content_losses, self.adversarial_weight = content_losses, adversarial_weight
        self.adversarial_loss, self.discriminator_loss = adversarial_loss, discriminator_loss
        self.penalties = penalties or {}

    def __call__(self, lr, hr):                                   # [N, 3, 24, 24], [N, 3, 96, 96]
        sr = self.G(lr)                                           # [N, 3, 96, 96]
        if self.D is None:                                        # SRResNet
            return self.update_generator(sr, hr)
        return self.update_discriminator(sr.detach(), hr) | self.update_generator(sr, hr)

    def update_discriminator(self, sr, hr):
        """The max over D of Eq. 2, as the min of its negative."""
        self.D.requires_grad_(True)
        real, fake = self.D(hr), self.D(sr)                       # logits [N]
        loss = self.discriminator_loss(fake, real)                # Eq. 2
        for weight, penalty in self.penalties.values():
            loss = loss + weight * penalty(sr, hr)
        minimize(loss, self.adam_D)
        self.D.requires_grad_(False)                              # fixed while G learns
        return {"discriminator": loss, "d_real": real.mean(), "d_fake": fake.mean()}

    def update_generator(self, sr, hr):
        """A step towards Eq. 1: theta_G minimises l^SR. Eq. 6 stands in for G's side of Eq. 2."""
        losses, content = {}, 0
        for name, (weight, content_loss) in self.content_losses.items():
            losses[name] = content_loss(sr, hr)                   # Eq. 4 or 5
            content = content + weight * losses[name]
        loss = content                                            # SRResNet
        if self.D is not None:                                    # SRGAN
            losses["adversarial"] = self.adversarial_loss(self.D, sr, hr)           # Eq. 6
            loss = perceptual_loss(content, losses["adversarial"], self.adversarial_weight)  # Eq. 3
        minimize(loss, self.adam_G)                               # Eq. 1
        return losses | {"loss": loss}


def minimize(loss, adam):
    """One step of Adam (Sec. 3.2: beta1 = 0.9, rate 1e-4, later 1e-5) down the loss's gradient."""
    adam.zero_grad()
    loss.backward()
    adam.step()


# ==================================================================================================
# 4. Data. Sec. 3.2: LR is HR, reduced by the bicubic kernel; LR is scaled to [0, 1], HR to [-1, 1].
# ==================================================================================================

SCALES = (2, 4, 8)
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm",
            ".pgm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")   # not EPS, which runs Ghostscript
EXIF_KEPT = {270, 271, 272, 305, 306, 315, 33432, 0x8769, 0x8825}  # texts, Exif IFD, GPS IFD
STORE_LIMIT = 32 * 2 ** 30                                       # bytes; larger data is streamed
SYMMETRIES = {"none": [0], "flip": [0, 1], "all": list(range(8))}  # bits: see cut_square


class InputError(ValueError):
    """An error that the user can fix. Its text is one line: what is wrong and what to do."""


def say(text):
    print(text, file=sys.stderr)


def one_line(error):
    """An exception's text, shortened to fit into a message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def find_images(path):
    """Sorted paths of the images in a folder and its subfolders, or one file. Raises InputError."""
    path = Path(path)
    found = [path] if path.is_file() else sorted(
        p for p in path.rglob("*")
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file())
    if not found:
        raise InputError(f"{path}: no images in this folder ({' '.join(SUFFIXES)})"
                         if path.is_dir() else f"{path}: no such file or folder")
    return found


def to_8_bits(image, raw):
    """Convert a PIL.Image of any mode to "L", "LA", "RGB" or "RGBA". Raises InputError.

    raw: Pillow's name for the pixels in the file; 16-bit grey with alpha has the mode "RGBA".
    """
    tags = image.tag_v2 if image.format == "TIFF" else {}        # 258: bits; 262: 0 if 0 is white
    if image.mode == "F" or tags and (image.mode == "I" or tags.get(258) == (12,)):
        raise InputError("only unsigned 8-bit and 16-bit images can be read; convert it")
    if image.mode.startswith("I"):                               # 16-bit grey: 65535 / 257 = 255
        pixels = np.asarray(image, np.int32)
        grey = np.uint8((pixels + 128) // 257)
        grey = Image.fromarray(255 - grey if tags.get(262) == 0 else grey)
        if "transparency" in image.info:
            grey.putalpha(Image.fromarray(np.uint8(255 * (pixels != image.info["transparency"]))))
        return grey
    if image.mode == "CMYK":
        with contextlib.suppress(Exception):                     # no profile, or a broken one
            from PIL import ImageCms
            return ImageCms.profileToProfile(image, io.BytesIO(image.info["icc_profile"]),
                                             ImageCms.createProfile("sRGB"), outputMode="RGB")
    mode = "L" if image.mode in ("1", "L", "LA") or raw == "LA;16B" else "RGB"
    return image.convert(mode + "A" * image.has_transparency_data)


def info_to_keep(image):
    """The ICC profile, DPI and EXIF data (date, camera, position) that the result keeps."""
    info = {key: image.info[key] for key in ("icc_profile", "dpi") if key in image.info}
    if image.mode == "CMYK":                                     # has become sRGB
        info.pop("icc_profile", None)
    if not all(0 < dots < 1e5 for dots in info.get("dpi", ())):  # 0/0 in some TIFFs
        del info["dpi"]
    with contextlib.suppress(Exception):                         # broken EXIF raises anything
        exif, kept = image.getexif(), Image.Exif()
        for tag in EXIF_KEPT & {*exif}:
            kept[tag] = exif[tag] if tag < 0x8769 else {
                key: value for key, value in exif.get_ifd(tag).items()
                if key not in (37500, 40962, 40963, 40965)}      # maker's notes, old sizes, offsets
        if len(kept) and len(data := kept.tobytes()) < 65_000:   # JPEG's limit
            info["exif"] = data
    return info


def open_image(path):
    """Decode an image: a PIL.Image of mode "L", "LA", "RGB" or "RGBA", 8 bits, upright.

    EXIF orientation is applied. Palettes become RGB or RGBA, CMYK becomes sRGB by its ICC profile,
    16 bits become 8, and an animation becomes its first frame. `info` comes from info_to_keep.
    Raises InputError if the image cannot be read.
    """
    try:
        # Not by its path: Pillow would map a plain TIFF into memory and leave it unrotated.
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as source:
            raw = source.tile[0][3] if source.tile else ""
            source.load()                                        # turns a TIFF upright
            with contextlib.suppress(Exception):                 # broken EXIF
                ImageOps.exif_transpose(source, in_place=True)
            image = to_8_bits(source, raw)
            image.info = info_to_keep(source)
            return image
    except Image.DecompressionBombError:
        raise InputError(f"{path}: more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.4g} megapixels; "
                         "upscale.py accepts it with a higher --max-megapixels") from None
    except Image.UnidentifiedImageError:
        raise InputError(f"{path}: cannot be read as an image (not {', '.join(FORMATS)}, or "
                         "broken)") from None
    except Exception as error:                                   # broken files raise anything
        raise InputError(f"{path}: cannot be read as an image ({one_line(error)})") from None


def open_rgb(path):
    """Decode an image to a uint8 array [h, w, 3]; transparency is dropped. Raises InputError."""
    return np.array(open_image(path).convert("RGB"))


def to_tensor(pixels):
    """uint8 [..., h, w, 3], array or tensor -> float32 [..., 3, h, w] in [0, 1]."""
    return torch.as_tensor(pixels).movedim(-1, -3).float().div(255)


def to_pixels(sr):
    """[..., 3, H, W] in [-1, 1] -> uint8 [..., H, W, 3], to the nearest grey level."""
    return sr.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)


def weighted_sums(x, taps, dim, stride=1):
    """Sums of len(taps) neighbours along `dim`, weighted by taps, at every stride-th position.

    A product and a sum instead of a convolution, whose factors some libraries round (TF32).
    """
    return (x.unfold(dim, len(taps), stride) * taps).sum(-1)


def bicubic_taps(scale):
    """The bicubic kernel (Keys 1981, a = -0.5), stretched by scale: 4 scale weights, sum 1.

    They are multiples of powers of two, which float32 holds exactly.
    """
    distance = (torch.arange(4 * scale) - 2 * scale + 0.5).abs() / scale       # in LR pixels
    near = 1.5 * distance ** 3 - 2.5 * distance ** 2 + 1                       # from 0 to 1
    far = -0.5 * distance ** 3 + 2.5 * distance ** 2 - 4 * distance + 2        # from 1 to 2
    return torch.where(distance < 1, near, far) / scale


def gaussian_taps(scale):
    """A Gaussian of sigma 0.4 scale (Sec. 2 gives no sigma), cut off beyond 3 sigma; sum 1."""
    n = scale + 2 * (5 * scale // 4)                             # LR pixel and 1.25 on each side
    return gaussian(n, 0.4 * scale)


def gaussian(n, sigma):
    """n weights exp(-d^2 / 2 sigma^2), d from the centre, divided by their sum. -> float64 [n]"""
    distance = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    return torch.softmax(-distance ** 2 / (2 * sigma ** 2), dim=0)


KERNELS = {"bicubic": bicubic_taps, "gaussian": gaussian_taps}   # name: weights for a scale


def reach(kernel, scale):
    """How far an LR pixel sees beyond its own HR pixels: in HR pixels, on each side."""
    return (len(KERNELS[kernel](scale)) - scale) // 2


def downsample(hr, scale=4, kernel="bicubic"):
    """LR from HR (Sec. 3.2): [N, 3, H, W] in [0, 1] -> [N, 3, H/scale, W/scale] in [0, 1], 8 bits.

    kernel: "bicubic" (Sec. 3.2) or "gaussian" (Sec. 2). Like the LR images of Set5, Set14, BSD100
    and Urban100, which "bicubic" reproduces bit for bit: vertically first, rounded to 8 bits (half
    up), then horizontally; pixels outside the image repeat its border. Raises ValueError unless
    H and W are multiples of scale.
    """
    h, w = hr.shape[2:]
    if h % scale or w % scale:
        raise ValueError(f"{h}x{w} is not a multiple of {scale}")
    taps = KERNELS[kernel](scale).to(hr)
    border = [reach(kernel, scale)] * 4
    x = F.pad(hr.contiguous(), border, mode="replicate")
    x = (x * 255).round() - 128                                  # so small that float32 sums are
    for dim in (2, 3):                                           # exact at every scale
        x = weighted_sums(x, taps, dim, scale)
        x = (x + 0.5).floor().clamp(-128, 127)
    return (x + 128) / 255


def upsample(lr, scale=4, method=Image.Resampling.BICUBIC):
    """The baselines, bicubic or nearest: uint8 [h, w, 3] -> uint8 [scale h, scale w, 3]."""
    h, w = lr.shape[:2]
    return np.array(Image.fromarray(lr).resize((w * scale, h * scale), method))


def by_stem(paths):
    """{stem: path}. Raises InputError if two images have the same name."""
    found = {}
    for path in paths:
        if path.stem in found:
            raise InputError(f"{path} and {found[path.stem]} have the same name; keep one of them")
        found[path.stem] = path
    return found


def lr_names(stem, scale):
    """The stems that the LR image of the HR image `stem` may have."""
    endings = "_LR", f"x{scale}", f"_x{scale}", f"_LRx{scale}", f"_LR_x{scale}"
    return [stem, *(stem.removesuffix("_HR") + ending for ending in endings)]


def find_hr(folder):
    """Paths of the HR images in a folder or its HR/. Raises InputError if some are LR images."""
    folder = Path(folder)
    folder = folder / "HR" if (folder / "HR").is_dir() else folder
    paths = find_images(folder)
    stems = {path.with_suffix("") for path in paths}
    for path in paths:
        below = str(path)[len(str(folder)):]
        if re.search(r"[\\/](LR[^\\/]*|X[2348])[\\/]", below, re.I) or any(
                path.with_name(name) in stems for scale in SCALES
                for name in lr_names(path.stem, scale)[1:]):
            raise InputError(f"{folder} also holds LR images (see {path}); put HR and LR images "
                             "into separate folders, and give the one with HR")
    return paths


def find_pairs(folder, lr_folder=None, scale=4, kernel="bicubic"):
    """[(stem, HR path, LR path or None)] of a folder of HR images, sorted by stem.

    The folder may also hold HR/ and, beside it, LR_<kernel>_x<scale>/ or LR_<kernel>/X<scale>/;
    lr_folder names LR images that are elsewhere. LR images have the name of their HR image, or
    that name and x4, _x4, _LR, _LRx4 or _LR_x4. Raises InputError if two images have the same
    name, or if an HR image has no LR image.
    """
    folder = Path(folder)
    if lr_folder is None and (folder / "HR").is_dir():
        usual = folder / f"LR_{kernel}_x{scale}", folder / f"LR_{kernel}" / f"X{scale}"
        lr_folder = next((path for path in usual if path.is_dir()), None)
    hr, pairs = by_stem(find_hr(folder)), []
    lr = by_stem(find_images(lr_folder)) if lr_folder else {}
    for stem, path in sorted(hr.items()):
        match = next((lr[name] for name in lr_names(stem, scale) if name in lr), None)
        if lr_folder and match is None:
            raise InputError(f"{path}: {lr_folder} holds no image of this name")
        pairs.append((stem, path, match))
    return pairs


def split(pairs, shares=(80, 15, 5), validate_on=0):
    """{"train", "val", "test"}: the pairs of find_pairs, divided by percentages.

    The order is that of the SHA-256 of the HR file names, the same on every machine. val and test
    get at least one image unless their share is 0. If validate_on is not 0, it limits val; the
    rest of val joins train.
    """
    ranked = sorted(pairs, key=lambda pair: (
        hashlib.sha256(os.fsencode(pair[1].name)).digest(), pair[1].as_posix()))
    val, test = (max(len(ranked) * share // 100, int(share > 0)) for share in shares[1:])
    held_out = min(val, validate_on or val)
    parts = {"val": ranked[:held_out], "test": ranked[val:val + test],
             "train": ranked[held_out:val] + ranked[val + test:]}
    return {name: sorted(part, key=lambda pair: pair[1]) for name, part in parts.items()}


def open_pair(hr_path, lr_path=None, scale=4, kernel="bicubic"):
    """(LR, HR), uint8 [h, w, 3]: HR cropped to a multiple of scale; LR made from it if not given.

    Raises InputError if an image cannot be read or the sizes do not match.
    """
    hr = open_rgb(hr_path)
    h, w = (side // scale for side in hr.shape[:2])
    if not h or not w:
        raise InputError(f"{hr_path}: {hr.shape[1]}x{hr.shape[0]} is smaller than one LR pixel")
    hr = hr[:h * scale, :w * scale]
    if lr_path is None:
        return to_pixels(downsample(to_tensor(hr)[None], scale, kernel) * 2 - 1)[0].numpy(), hr
    lr = open_rgb(lr_path)
    if lr.shape != (h, w, 3):
        raise InputError(f"{lr_path}: {lr.shape[1]}x{lr.shape[0]} is not 1/{scale} of "
                         f"{hr_path.name} (expected {w}x{h})")
    return lr, hr


class Store:
    """Images, decoded once into a file under `cache`: store[i] is a uint8 tensor [h, w, 3].

    The file is memory-mapped; its name depends on the images' paths, sizes and times. mode:
    "always", "never" (images are decoded each time they are needed), or "auto" ("never" if the file
    would exceed 32 GiB or half of the free disk). Raises InputError if the disk is too small.
    """

    def __init__(self, paths, cache="cache", mode="auto"):
        self.paths, self.size, self.pixels = list(paths), None, None
        Path(cache).mkdir(parents=True, exist_ok=True)
        if mode == "never" or mode == "auto" and self.is_too_large(cache):
            return
        stats = [(os.path.abspath(path), os.stat(path)) for path in self.paths]
        key = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        file = Path(cache, hashlib.sha256(repr(key).encode()).hexdigest()[:20] + ".pixels")
        with FileLock(f"{file}.lock"):                           # another process may be writing it
            if not file.exists():
                self.decode(file)
        mapped = np.memmap(file, np.uint8, "c")                  # copy-on-write, as torch requires
        pixels, size = np.split(mapped, [-16 * len(self.paths)])
        self.size = np.array(size.view(np.int64).reshape(-1, 2))  # heights and widths
        self.start = np.cumsum(self.size.prod(1)) - self.size.prod(1)
        self.pixels = torch.from_numpy(pixels).view(-1, 3)

    def is_too_large(self, cache):
        """Whether the pixels would not fit, as estimated from the headers of up to 100 images."""
        n_bytes, sample = 0, self.paths[::len(self.paths) // 100 + 1]
        for path in sample:
            with contextlib.suppress(Exception), Image.open(path, formats=FORMATS) as image:
                n_bytes += 3 * image.width * image.height * len(self.paths) / len(sample)
        too_large = n_bytes > min(STORE_LIMIT, shutil.disk_usage(cache).free / 2)
        if too_large:
            say(f"about {n_bytes / 2 ** 30:.1f} GiB of pixels do not fit into {cache}; images are "
                "decoded each time they are needed")
        return too_large

    def decode(self, file):
        """Write to `file` the pixels of all images, one after another, and then their sizes."""
        def pixels(path):
            with contextlib.suppress(InputError):
                return open_rgb(path)
            return np.empty((0, 0, 3), np.uint8)                 # unreadable

        sizes = []
        try:
            with replacing(file) as temporary, open(temporary, "wb") as output, \
                    ThreadPoolExecutor() as pool, \
                    tqdm(total=len(self.paths), desc="decoding once", disable=None) as bar:
                for first in range(0, len(self.paths), 64):      # to bound the memory
                    for image in pool.map(pixels, self.paths[first:first + 64]):
                        output.write(image)
                        sizes.append(image.shape[:2])
                        bar.update()
                output.write(np.array(sizes, np.int64))
        except OSError as error:
            raise InputError(f"{file.parent}: cannot hold the decoded pixels ({one_line(error)}); "
                             "name another folder with --cache, or use --set store=never") from None

    def __getitem__(self, i):
        """Raises InputError if the image has to be decoded and is unreadable."""
        if self.pixels is None:
            return torch.from_numpy(open_rgb(self.paths[i]))
        (h, w), start = self.size[i], self.start[i]
        return self.pixels[start:start + h * w].view(h, w, 3)


class Patches:
    """Random training patches: "16 random 96x96 HR sub images of distinct training images".

    hr, lr: Stores; without lr, `kernel` makes LR from HR. patch_size: the side of the HR patches,
    a multiple of scale. augment: "none", "flip" (mirror images) or "all" (eight flips and
    rotations). crop_margin: the share of the height and width, 0 to below 0.5, that patches keep
    clear of at each border. The batch of update `step` depends only on (seed, rank, step).
    Images that are unreadable or too small are left out. Raises InputError if none remains.
    """

    def __init__(self, hr, patch_size=96, scale=4, kernel="bicubic", augment="all",
                 crop_margin=0.0, lr=None, device="cpu", seed=0, rank=0):
        self.hr, self.lr, self.scale, self.kernel = hr, lr, scale, kernel
        self.symmetries, self.crop_margin = SYMMETRIES[augment], crop_margin
        self.device, self.seed, self.rank = torch.device(device), seed, rank
        self.margin = math.ceil(reach(kernel, scale) / scale)    # around a patch, in LR pixels
        self.window, self.reported = None, set()                 # images left out while streaming
        self.resize(patch_size)
        for store in (hr, lr):
            if self.device.type == "cuda" and store and store.pixels is not None and \
                    store.pixels.nbytes < torch.cuda.mem_get_info(self.device)[0] // 2:
                store.pixels = store.pixels.to(self.device)

    def resize(self, patch_size):
        """Draw patches of this size from now on."""
        window, self.window = self.window, patch_size + 2 * self.margin * self.scale
        if self.window == window:
            return
        usable = np.ones(len(self.hr.paths), bool)
        if self.hr.size is not None:
            usable = (self.hr.size >= self.window).all(1)
        if left_out := [str(path) for path, good in zip(self.hr.paths, usable) if not good]:
            say(f"left out {len(left_out)} of {len(usable)} images, unreadable or smaller than "
                f"{self.window}x{self.window}, such as {', '.join(left_out[:3])}")
        if not usable.any():
            raise InputError(f"no image is {self.window}x{self.window} or larger, the size of a "
                             f"patch of {patch_size} with its margin; use larger images or a "
                             "smaller patch_size")
        self.probability = usable / usable.sum()

    def draw(self, step, n, attempt=0):
        """n random (image, [y, x] in [0, 1), symmetry); distinct images if there are enough."""
        rng = np.random.default_rng((self.seed, self.rank, step + attempt * 2 ** 40))
        distinct = np.count_nonzero(self.probability) >= n
        image = rng.choice(len(self.probability), n, replace=not distinct, p=self.probability)
        return list(zip(image, rng.random((n, 2)), rng.choice(self.symmetries, n)))

    def cut(self, image, place, symmetry):
        """The window of an image at [y, x]: [w, w, 3] of HR and, if there is an LR store, of LR."""
        hr, scale = self.hr[image], self.scale
        size = np.array(hr.shape[:2])
        free = size // scale - self.window // scale              # range of its corner, in LR pixels
        if free.min() < 0:
            raise InputError(f"{self.hr.paths[image]}: smaller than {self.window}x{self.window}")
        margin = np.minimum((self.crop_margin * size / scale).astype(np.int64), free // 2)
        corner = margin + (place * (free - 2 * margin + 1)).astype(np.int64)
        windows = [cut_square(hr, corner * scale, self.window, symmetry)]
        if self.lr is not None:
            lr = self.lr[image]
            if lr.shape[:2] != (*size // scale,):
                raise InputError(f"{self.lr.paths[image]}: not 1/{scale} of its HR image's size")
            windows.append(cut_square(lr, corner, self.window // scale, symmetry))
        return windows

    def windows(self, step, n):
        """The windows of update `step`: uint8 [n, w, w, 3] of HR and, as in cut, of LR."""
        found = []
        for attempt in range(10):                                # replace those that fail
            for drawn in self.draw(step, n - len(found), attempt):
                try:
                    found.append(self.cut(*drawn))
                except InputError as error:
                    if str(error) not in self.reported:          # once per image
                        self.reported.add(str(error))
                        say(f"left out: {error}")
            if len(found) == n:
                return [torch.stack(windows) for windows in zip(*found)]
        raise InputError("most of the training images cannot be used")

    def stream(self, n, first, last):
        """The windows of updates first to last - 1, decoded a little ahead by threads."""
        ahead, threads = deque(), os.cpu_count()
        pool = ThreadPoolExecutor(threads)
        try:
            for step in range(first, last):
                ahead.append(pool.submit(self.windows, step, n))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:                                                 # also when the caller stops early
            pool.shutdown(cancel_futures=True)

    def batches(self, n, first, last):
        """Yield LR [n, 3, p/scale, p/scale] in [0, 1] and HR [n, 3, p, p] in [-1, 1] for updates
        first to last - 1; p is the patch size."""
        stored = (self.windows(step, n) for step in range(first, last))
        for hr, *lr in (self.stream(n, first, last) if self.hr.pixels is None else stored):
            hr = self.upload(hr)                                 # [n, 3, window, window]
            lr = self.upload(*lr) if lr else downsample(hr, self.scale, self.kernel)
            lr = F.pad(lr, [-self.margin] * 4)
            hr = F.pad(hr, [-self.margin * self.scale] * 4) * 2 - 1
            yield tuple(x.contiguous(memory_format=torch.channels_last) for x in (lr, hr))

    def upload(self, windows):
        """uint8 [n, w, w, 3] -> float32 [n, 3, w, w] in [0, 1], on the device."""
        if windows.device.type == "cpu" and self.device.type == "cuda":
            windows = windows.pin_memory()                       # for an asynchronous copy
        return to_tensor(windows.to(self.device, non_blocking=True))


def cut_square(image, corner, side, symmetry):
    """[h, w, 3] -> [side, side, 3]. Bits of symmetry: flip left-right, flip up-down, transpose."""
    patch = image[corner[0]:corner[0] + side, corner[1]:corner[1] + side]
    patch = patch.flip(1) if symmetry & 1 else patch
    patch = patch.flip(0) if symmetry & 2 else patch
    return patch.transpose(0, 1) if symmetry & 4 else patch


# ==================================================================================================
# 5. Metrics. Sec. 3.1: PSNR and SSIM "on the y-channel", without "a 4-pixel wide strip from each
#    border"; here on 8-bit values, in float64. LPIPS is later work and takes RGB.
# ==================================================================================================

ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


def planes(sr, hr, shave, luma):
    """Two images as psnr takes them -> two float64 [..., 1 or 3, H - 2 shave, W - 2 shave]."""
    if sr.shape != hr.shape:
        raise ValueError(f"images of different sizes: {tuple(sr.shape)} and {tuple(hr.shape)}")
    for image in (sr, hr):
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(np.array(image)).movedim(-1, -3)
        elif image.is_floating_point():
            image = to_pixels(image).movedim(-1, -3)             # as saved to a file
        if image.dtype != torch.uint8 or image.dim() < 3 or image.shape[-3] != 3:
            raise ValueError("expected uint8 [H, W, 3] arrays or [..., 3, H, W] tensors, not "
                             f"{image.dtype} {tuple(image.shape)}")
        h, w = image.shape[-2:]
        if min(h, w) <= 2 * shave:
            raise InputError(f"{h}x{w}: nothing is left inside a border of {shave} pixels")
        x = image[..., shave:h - shave, shave:w - shave].double()
        if luma:                                                 # Y of BT.601, in [16, 235]
            r, g, b = x.split(1, dim=-3)
            x = 16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255
        yield x


def psnr(sr, hr, shave=4, luma=True):
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / MSE); inf for identical images.

    Two uint8 arrays [H, W, 3] -> float. Two tensors [..., 3, H, W], uint8 or float in [-1, 1]
    (first rounded to 8 bits) -> float64 tensor [...]. shave: pixels removed from each border.
    luma: on Y of BT.601 instead of RGB. Raises ValueError if the sizes differ or nothing remains.
    """
    x, y = planes(sr, hr, shave, luma)
    value = 10 * torch.log10(255 ** 2 / (x - y).square().mean((-3, -2, -1)))
    return value.item() if isinstance(sr, np.ndarray) else value


def ssim(sr, hr, shave=4, luma=True):
    """Structural similarity of Wang et al. 2004, in [-1, 1]. Arguments and errors as for psnr.

    11x11 Gaussian window of sigma 1.5, only inside the image; K1 = 0.01, K2 = 0.03, L = 255.
    """
    x, y = planes(sr, hr, shave, luma)
    if min(x.shape[-2:]) < 11:
        raise InputError("SSIM needs 11x11 pixels inside the border")
    window = gaussian(11, 1.5).to(x)

    def mean(x):                                                 # weighted by the window
        return weighted_sums(weighted_sums(x, window, -2), window, -1)
    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y = mean(x * x) - mu_x ** 2, mean(y * y) - mu_y ** 2
    covariance = mean(x * y) - mu_x * mu_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    value = (2 * mu_x * mu_y + c1) * (2 * covariance + c2) \
        / ((mu_x ** 2 + mu_y ** 2 + c1) * (var_x + var_y + c2))
    value = value.mean((-3, -2, -1))
    return value.item() if isinstance(sr, np.ndarray) else value


@functools.cache
def load_lpips():
    """LPIPS's network (AlexNet, version 0.1), downloaded on first use. Raises InputError."""
    try:
        import lpips
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                      # outdated arguments inside lpips
            return lpips.LPIPS(net="alex", verbose=False).eval()
    except Exception as error:                                   # no package, no network, bad file
        raise InputError(f"LPIPS is not available ({one_line(error)}); download {ALEXNET_URL} "
                         f"elsewhere and put it into {torch.hub.get_dir()}/checkpoints, or leave "
                         "LPIPS out") from None


@torch.inference_mode()
def lpips(sr, hr, shave=0, luma=False):
    """Zhang et al. 2018: distance of whole RGB images, uint8 [H, W, 3]; ignores shave and luma."""
    if min(hr.shape[:2]) < 32:
        raise InputError("LPIPS needs at least 32x32 pixels; leave it out")
    network = load_lpips()
    device = next(network.parameters()).device
    x, y = (to_tensor(image)[None].to(device) * 2 - 1 for image in (sr, hr))
    return network(x, y).item()


Metric = namedtuple("Metric", "function title digits higher_is_better")
METRICS = {
    "psnr": Metric(psnr, "PSNR (dB)", digits=2, higher_is_better=True),
    "ssim": Metric(ssim, "SSIM", digits=4, higher_is_better=True),
    "lpips": Metric(lpips, "LPIPS", digits=4, higher_is_better=False),
}


def usable_metrics(with_lpips=True, device="cpu"):
    """Names of METRICS, LPIPS only if it is wanted and available; if it is not, a line says so."""
    try:
        if with_lpips:
            load_lpips().to(device)
            return list(METRICS)
    except InputError as error:
        say(f"{error}; going on without it")
    return [name for name in METRICS if name != "lpips"]


def measure(sr, hr, names=tuple(METRICS), shave=4, luma=True):
    """Compare two uint8 arrays [H, W, 3]: {name: value} of METRICS, None if not in `names`."""
    return {name: metric.function(sr, hr, shave, luma) if name in names else None
            for name, metric in METRICS.items()}


def aggregate(scores):
    """Results of measure for several images -> {metric: {"mean", "std"}, or None if missing}."""
    columns = {name: [score[name] for score in scores] for name in METRICS}
    with np.errstate(invalid="ignore"):                          # inf - inf
        return {name: None if None in values else
                {"mean": float(np.mean(values)), "std": float(np.std(values))}
                for name, values in columns.items()}


def describe(metrics):
    """Means as text, such as "PSNR 28.43  SSIM 0.8111"."""
    return "  ".join(f"{name.upper()} {metrics[name]['mean']:.{metric.digits}f}"
                     for name, metric in METRICS.items() if metrics[name])


def side_by_side(images, labels):
    """uint8 [h, w, 3] arrays of one size, each with its label below it -> PIL.Image."""
    h, w, _ = images[0].shape
    longest = max("\n".join(labels).split("\n"), key=ImageFont.load_default(24).getlength)
    size = next((n for n in range(24, 8, -1)
                 if ImageFont.load_default(n).getlength(longest) <= w), 8)
    height = h + (1 + max(label.count("\n") + 1 for label in labels)) * size * 4 // 3
    sheet = Image.new("RGB", (len(images) * (w + 4) - 4, height), "white")
    for i, (image, label) in enumerate(zip(images, labels)):
        sheet.paste(Image.fromarray(image), (i * (w + 4), 0))
        ImageDraw.Draw(sheet).text((i * (w + 4) + w / 2, (h + height) / 2), label, fill="black",
                                   font_size=size, anchor="mm", align="center")
    return sheet


# ==================================================================================================
# 6. Upscaling. An SR pixel depends only on the LR pixels within the network's radius. So tiles that
#    overlap by this radius, cropped to their own area, give exactly the untiled result. The layers
#    at LR size see far and take little memory; those after them see 3 LR pixels and take much. So
#    the former process large tiles, and the latter enlarge each tile in small parts.
# ==================================================================================================

TILE = 1448                              # LR pixels per side: 2 megapixels take 2 GB
PART = 128                               # LR pixels per side that are enlarged together


# The slices of a tile, and what it sees: itself and the overlap.
Area = namedtuple("Area", "rows columns seen_rows seen_columns")


def radii(generator):
    """How far an SR pixel sees, in LR pixels: (through all of G, through what follows the skip)."""
    before = reach(generator.head, generator.blocks, generator.fuse)
    enlarging = reach(generator.upsample, generator.tail)
    return before + enlarging, enlarging


def reach(*networks):
    """How far a pixel behind these networks sees, in pixels of their input, rounded up."""
    pixels = 0
    size = 1                                                     # of a pixel, halved by a shuffle
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                pixels += module.kernel_size[0] // 2 * size      # a k x k kernel sees k // 2
            elif isinstance(module, nn.PixelShuffle):
                size /= module.upscale_factor
    return math.ceil(pixels)


def spans(length, side, overlap):
    """Cut a length into even parts of at most `side`: [(part, part with the overlap)], slices."""
    count = math.ceil(length / side)
    ends = [length * i // count for i in range(count + 1)]
    parts = []
    for start, end in zip(ends, ends[1:]):
        seen = slice(max(start - overlap, 0), min(end + overlap, length))
        parts.append((slice(start, end), seen))
    return parts


def cut(height, width, side, overlap):
    """Cut an area into even tiles of at most side x side: a list of `Area`."""
    areas = []
    for rows, seen_rows in spans(height, side, overlap):
        for columns, seen_columns in spans(width, side, overlap):
            areas.append(Area(rows, columns, seen_rows, seen_columns))
    return areas


def cut_for_enlarging(height, width, overlap=0):
    """Cut a tile into the parts that are enlarged one after the other: a list of `Area`.

    Small parts save memory and take a little more time. They are worth it only for tiles of medium
    size: beside the maps of a large tile, no part counts, and a small tile takes little anyway.
    """
    side = PART
    if 128 * 128 < height * width < 512 * 512 and min(height, width) >= 32:
        side = PART // 2
    return cut(height, width, side, overlap)


def paste(result, sr, area):
    """Copy SR of a tile, without its overlap, to its place in the result: [..., H, W] both."""
    scale = sr.shape[-1] // (area.seen_columns.stop - area.seen_columns.start)
    top = (area.rows.start - area.seen_rows.start) * scale
    left = (area.columns.start - area.seen_columns.start) * scale
    place = result[..., area.rows.start * scale:area.rows.stop * scale,
                   area.columns.start * scale:area.columns.stop * scale]
    height, width = place.shape[-2:]
    place.copy_(sr[..., top:top + height, left:left + width])


def super_resolve(generator, lr, bar):
    """G, whose last layers see one part of LR after the other: [1, 3, h, w] -> [1, 3, H, W]."""
    height, width = lr.shape[2:]
    scale = generator.arch["scale"]
    sr = lr.new_empty(1, 3, scale * height, scale * width)
    maps = features(generator, lr)                               # [1, 64, h, w]
    for part in cut_for_enlarging(height, width, radii(generator)[1]):
        seen = maps[..., part.seen_rows, part.seen_columns]
        paste(sr, enlarge(generator, seen), part)
        bar.update()
    return sr


def self_ensemble(generator, lr, bar):
    """The mean of SR over the eight flips and rotations of LR, each undone in SR."""
    total = 0
    for turns in range(4):
        for flipped in (False, True):
            view = lr.flip(3) if flipped else lr
            sr = super_resolve(generator, torch.rot90(view, turns, (2, 3)), bar)
            sr = torch.rot90(sr, -turns, (2, 3))
            total = total + (sr.flip(3) if flipped else sr)
    return total / 8


@torch.inference_mode()
def upscale(generator, image, tile=None, ensemble=False, precision="fp32", progress=False):
    """Super-resolve an image: uint8 [h, w, 3] -> uint8 [scale h, scale w, 3].

    tile: side of the tiles, in LR pixels; 0 for one tile. It bounds the memory and does not change
    the result. ensemble: average over the eight flips and rotations. precision: "fp32" or "bf16".
    progress: show a progress bar. Raises TypeError for anything but uint8 [h, w, 3], and
    MemoryError if there is not enough memory.
    """
    if not (isinstance(image, np.ndarray) and image.dtype == np.uint8
            and image.shape[2:] == (3,) and image.size):
        raise TypeError("upscale takes a uint8 array [h, w, 3] of RGB pixels")

    # Cut the image into tiles that overlap as far as the network sees.
    height, width, _ = image.shape
    scale = generator.arch["scale"]
    if tile is None:
        side = TILE * 4 // max(4, scale)
    else:
        side = tile or max(height, width)
    areas = cut(height, width, side, radii(generator)[0])

    # The progress bar counts the parts of all tiles, eight times for an ensemble.
    parts = 0
    for area in areas:
        seen = image[area.seen_rows, area.seen_columns]
        parts += len(cut_for_enlarging(len(seen), len(seen[0])))
    method = super_resolve
    if ensemble:
        method = self_ensemble
        parts *= 8

    # Super-resolve one tile after the other.
    device = next(generator.parameters()).device
    try:
        result = torch.empty(height * scale, width * scale, 3, dtype=torch.uint8)
        with tqdm(total=parts, unit="part", leave=False, disable=not progress) as bar, \
                arithmetic(device, precision):
            for area in areas:
                seen = image[area.seen_rows, area.seen_columns].copy()       # [h, w, 3]
                lr = to_tensor(torch.from_numpy(seen).to(device))[None]
                lr = lr.contiguous(memory_format=torch.channels_last)
                pixels = to_pixels(method(generator, lr, bar))[0]            # [H, W, 3]
                paste(result.movedim(-1, 0), pixels.movedim(-1, 0), area)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError("out of memory; use smaller tiles") from None
    return result.numpy()


@contextlib.contextmanager
def arithmetic(device, precision):
    """Compute in bf16, or in fp32 without TF32. The program's own settings come back afterwards."""
    if precision == "bf16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
    elif device.type != "cuda":
        yield
    elif hasattr(torch.backends.cudnn, "conv"):                  # since torch 2.9
        before = torch.backends.cudnn.conv.fp32_precision
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        try:
            yield
        finally:
            torch.backends.cudnn.conv.fp32_precision = before
    else:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield


def is_out_of_memory(error):
    """Whether an error of torch, CUDA, cuDNN, cuBLAS or oneDNN means that memory ran out."""
    words = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc",
             "create a memory object")
    return isinstance(error, MemoryError) or any(text in str(error) for text in words)


# ==================================================================================================
# 7. Checkpoints. A dictionary of tensors, numbers and strings. "generator": the result of
#    training, the moving average of G's weights; "arch": G's arguments; and what train.py adds.
# ==================================================================================================

VGG19_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def float_state(network):
    """Parameters and batch-norm statistics, as a list of tensors."""
    return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]


@torch.no_grad()
def ema_(average, current, decay):
    """average = decay * average + (1 - decay) * current, in place; both are float_state lists."""
    torch._foreach_lerp_(average, current, 1 - decay)


@contextlib.contextmanager
def replacing(path):
    """A temporary path beside `path`: renamed to `path` on success, deleted on failure.

    Its name depends only on `path`, so that the next run replaces what a killed one left behind.
    """
    path = Path(os.path.realpath(path))                          # a link stays one
    if path.exists() and not path.is_file():
        yield path                                               # /dev/stdout
        return
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    temporary = path.with_name(f".{name}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, document):
    """Write JSON atomically; inf and NaN, which JSON lacks, become null."""
    document = json.loads(json.dumps(document), parse_constant=lambda name: None)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n")


def save_checkpoint(path, generator, **more):
    """Write the weights and arguments of `generator` and the items of `more`, atomically."""
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save({"generator": generator.state_dict(), "arch": generator.arch, **more}, file)
            file.flush()
            os.fsync(file.fileno())                              # before the rename
    except (RuntimeError, OSError) as error:                     # a full disk can raise either
        raise InputError(f"{path}: cannot be written ({one_line(error)})") from None


def load_checkpoint(path):
    """Read a dictionary that torch.save wrote, onto the CPU. Nothing in it is executed.

    Raises InputError if the file is anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:                                   # torch.load raises anything
        raise InputError(f"{path}: not a checkpoint of plain tensors "
                         f"({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: not a checkpoint but a {type(state).__name__}")
    return state


def make_generator(block="residual", **arch):
    """The generator that GENERATORS lists for `block`, with the given arguments."""
    return GENERATORS[block](**arch)


def load_generator(path, device="cpu"):
    """The generator of a checkpoint of train.py: float32, in eval mode. Raises InputError."""
    state = load_checkpoint(path)
    try:
        with torch.device("meta"):                               # takes no memory
            generator = make_generator(**state["arch"])
        generator.load_state_dict(state["generator"], assign=True)
    except Exception as error:                                   # a file may hold anything
        raise InputError(f"{path}: no generator of train.py "
                         f"({type(error).__name__}: {one_line(error)})") from None
    return generator.float().to(device, memory_format=torch.channels_last).eval()


def load_features(network, weights, url):
    """Load weights into a content network (see TruncatedVGG19) and return it. Raises InputError."""
    if weights == "random":
        rng = torch.Generator().manual_seed(0)
        for p in network.parameters():
            nn.init.kaiming_normal_(p, generator=rng) if p.dim() > 1 else nn.init.zeros_(p)
        return network
    if weights == "imagenet":
        try:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True,
                                                       weights_only=True)
        except Exception as error:                               # offline, cut off, wrong hash
            raise InputError(f"cannot download {url} ({one_line(error)}); download it elsewhere "
                             "and pass --feature-weights FILE, or --feature-weights random to try "
                             "things out") from None
    else:
        state = load_checkpoint(weights)
    state = {str(key).removeprefix("features."): value for key, value in state.items()}
    try:
        network.load_state_dict({key: state[key] for key in network.state_dict()})
    except (KeyError, RuntimeError) as error:                    # missing, or of another shape
        raise InputError(f"{weights}: no weights of this network ({one_line(error)})") from None
    return network


def run(main):
    """Call a script's main() and exit with its status; an InputError is one line and status 2."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.filterwarnings("ignore", module="PIL")              # about odd files
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                           # closed, for example by cron
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # odd file names
    try:
        status = main()
    except (InputError, OSError) as error:
        status = str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        status = "out of memory; use a smaller --tile or --batch-size"
    except KeyboardInterrupt:
        status = 130
    if isinstance(status, str):
        say(f"{Path(sys.argv[0]).name}: {status}")
        status = 2
    sys.exit(status)


# ==================================================================================================
# 8. Beyond the paper: G's initialisation, and what other presets select, each with its source.
# ==================================================================================================

class DenseBlock(nn.Module):
    """Wang et al. 2018, Fig. 4: five k3 convolutions, each of which sees all earlier maps."""

    def __init__(self, n, growth=32):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(n + i * growth, growth if i < 4 else n, 3, padding=1)
                                   for i in range(5))

    def forward(self, x):                                        # [N, 64, h, w]
        maps = x
        for conv in self.convs[:-1]:
            maps = torch.cat([maps, F.leaky_relu(conv(maps), 0.2)], 1)  # [N, 96 to 192, h, w]
        return x + 0.2 * self.convs[-1](maps)


class RRDB(nn.Module):
    """Wang et al. 2018, arXiv:1809.00219: ESRGAN's residual-in-residual dense block, no BN."""

    def __init__(self, n):
        super().__init__()
        self.body = nn.Sequential(DenseBlock(n), DenseBlock(n), DenseBlock(n))

    def forward(self, x):
        return x + 0.2 * self.body(x)


class RRDBGenerator(Generator):
    """G with RRDBs. The default arguments are those of the paper, not ESRGAN's 23 blocks."""
    block = "rrdb"

    def __init__(self, scale=4, channels=64, n_blocks=16, tanh=True):
        super().__init__(scale, channels, 0, tanh)
        self.arch["n_blocks"] = n_blocks
        self.blocks = nn.Sequential(*[RRDB(channels) for _ in range(n_blocks)])
        self.fuse = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))


@torch.no_grad()
def start_as_nearest(generator):
    """Start G as nearest-neighbour upsampling: it learns faster and shows no checkerboard.

    Three channels carry RGB from end to end. The four filters that PixelShuffle interleaves into
    one map start with equal weights (ICNR, Aitken et al. 2017, arXiv:1707.02937).
    """
    nn.init.dirac_(generator.head[0].weight[:3])
    generator.head[0].bias[:3] = 0
    for p in generator.fuse[-1].parameters():                    # the skip connection alone
        nn.init.zeros_(p)
    for conv in generator.upsample[::3]:
        nn.init.dirac_(conv.weight[:12:4])
        conv.bias[:12:4] = 0
        for p in (conv.weight, conv.bias):
            p.copy_(p[::4].repeat_interleave(4, dim=0))
    nn.init.dirac_(generator.tail.weight).mul_(2.5)              # tanh(2.5 x - 1.25) is near
    generator.tail.bias.fill_(-1.25)                             # 2 x - 1


GENERATORS = {"residual": Generator, "rrdb": RRDBGenerator}
INITS = {"nearest": start_as_nearest, "torch": lambda generator: None}
NORMS = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}


class TruncatedSqueezeNet(ContentNetwork):
    """SqueezeNet 1.1 up to features[layer]: 1/60 of the work of VGG19. See TruncatedVGG19.

    layer "12" is the last: [N, 3, 96, 96] -> [N, 512, 5, 5].
    """
    layers = tuple(map(str, range(13)))

    def __init__(self, layer="12", weights="imagenet", divisor=12.75):
        from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1
        features = squeezenet1_1().features[:int(layer) + 1]
        url = SqueezeNet1_1_Weights.IMAGENET1K_V1.url
        super().__init__(load_features(features, weights, url), divisor)


def grid_loss(sr, hr, scale=4, window=8):
    """Penalise a grid of the period of an LR pixel. [N, 3, H, W] in [-1, 1] twice -> scalar.

    An LR pixel covers scale^2 positions of SR. First term: the mean error at each position, over
    windows of LR pixels; texture cancels out, a grid remains. Second term: how much the strength
    of SR's detail differs between the positions, as it does in rows of dots.
    """
    error = F.pixel_unshuffle(sr - hr, scale)                    # [N, 3 x 16, h, w]
    error = F.avg_pool2d(error, min(window, *error.shape[2:]))   # [N, 3 x 16, h / 8, w / 8]
    detail = sr - F.avg_pool2d(sr, 5, 1, 2, count_include_pad=False)
    power = F.pixel_unshuffle(detail, scale).square().mean((2, 3)).unflatten(1, (3, -1))
    strength = power.add(1e-4).sqrt()                            # [N, 3, 16]; 1e-4: a grey level^2
    uneven = strength - strength.mean(2, keepdim=True)
    return error.abs().mean() + uneven.abs().mean()


def fourier_loss(sr, hr, window=16):
    """The Fourier amplitude loss of Fuoli et al. 2021, arXiv:2106.00783, in overlapping windows.

    On grey and on two colour differences, it compares how much texture of each frequency and
    direction there is, not where. [N, 3, H, W] in [-1, 1] twice, H and W >= window -> scalar.
    """
    hann = torch.hann_window(window, periodic=False, device=sr.device)
    hann = hann / hann.square().mean().sqrt()

    def amplitudes(x):
        r, g, b = x.float().unbind(1)
        x = torch.stack([(r + g + b) / 3 ** 0.5, (r - b) / 2 ** 0.5, (r - 2 * g + b) / 6 ** 0.5], 1)
        x = x.unfold(2, window, window // 2).unfold(3, window, window // 2)
        return torch.fft.rfft2(x * hann * hann[:, None], norm="ortho").abs()

    return (amplitudes(hr) - amplitudes(sr)).abs().mean()


CONTENT_NETWORKS = {"vgg19": TruncatedVGG19, "squeezenet1_1": TruncatedSqueezeNet}
PIXEL_LOSSES = {"mse": mse_loss, "l1": F.l1_loss}
CONTENT_LOSSES = {  # name: function of SR, HR and settings; its weight is the setting <name>_weight
    "pixel": lambda sr, hr, use: PIXEL_LOSSES[use.pixel_loss](sr, hr),
    "content": lambda sr, hr, use: content_loss(use.phi, sr, hr),
    "tv": lambda sr, hr, use: total_variation(sr),
    "grid": lambda sr, hr, use: grid_loss(sr, hr, use.scale),
    "fourier": lambda sr, hr, use: fourier_loss(sr, hr),
}


def relativistic_adversarial_loss(D, sr, hr):
    """Wang et al. 2018, Eq. 2: SR should look more real than the average HR, and
    HR less real than the average SR."""
    fake, real = D(sr), D(hr)
    return discriminator_loss(real - fake.mean(), fake - real.mean())


def input_gradient(D, x):
    """The gradient of each image's score: [N, 3, H, W] -> [N, 3 H W]."""
    x = x.detach().requires_grad_()
    gradient, = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return gradient.flatten(1)


def gradient_penalty(D, sr, hr):
    """Gulrajani et al. 2017, arXiv:1704.00028, Eq. 3: the mean of (|grad D(x)| - 1)^2 at random
    points x between SR and HR."""
    mix = torch.rand(len(hr), 1, 1, 1, dtype=hr.dtype, device=hr.device)
    return (input_gradient(D, torch.lerp(hr, sr, mix)).norm(dim=1) - 1).square().mean()


def r1_penalty(D, sr, hr):
    """Mescheder et al. 2018, arXiv:1801.04406, Eq. 9, for gamma = 1: mean of |grad D(HR)|^2 / 2."""
    return input_gradient(D, hr).square().sum(1).mean() / 2


ADVERSARIAL_LOSSES = {  # name: (G's, a function of D, SR and HR; D's, of D(SR) and D(HR))
    "bce": (adversarial_loss, discriminator_loss),
    "wasserstein": (lambda D, sr, hr: -D(sr).mean(),             # Gulrajani et al. 2017, Eq. 3
                    lambda fake, real: fake.mean() - real.mean()),
    "relativistic": (relativistic_adversarial_loss,              # Wang et al. 2018, Eq. 1
                     lambda fake, real: discriminator_loss(fake - real.mean(), real - fake.mean())),
}
PENALTIES = {"gradient_penalty": gradient_penalty, "r1_penalty": r1_penalty}  # settings: weights


def shifted(step, shift):
    """A step of Update, for which SR and HR are rolled together by 0 to `shift` random pixels.

    Without it, strides in D and pooling in phi favour some positions, and G learns their pattern.
    """
    def shifted_step(sr, hr):
        move = torch.randint(shift + 1, (2,)).tolist()
        return step(sr.roll(move, (2, 3)), hr.roll(move, (2, 3)))
    return shifted_step


def critic_steps(update, *batches):
    """Gulrajani et al. 2017: several steps of D, each with its own batch, for each step of G."""
    *earlier, lr, hr = batches                                   # LR, HR, LR, HR, ...
    for early_lr, early_hr in zip(earlier[::2], earlier[1::2]):
        with torch.no_grad():
            sr = update.G(early_lr)
        update.update_discriminator(sr, early_hr)
    return update(lr, hr)


# ==================================================================================================
# 9. Speed: the same mathematics, computed faster. `Fast` replaces the forms that follow Fig. 4.
# ==================================================================================================

class Fast(nn.Module):
    """A network as training calls it: in its fast form and the given precision, float32 in and out.

    It shares the network's parameters; save and load the network itself.
    """

    def __init__(self, network, precision="fp32"):
        super().__init__()
        self.network = network
        self.precision = precision
        for module in list(network.modules()):
            for name, layer in module.named_children():
                if type(layer) is nn.PReLU:
                    setattr(module, name, FastPReLU(layer.weight))
                elif isinstance(layer, (nn.ReLU, nn.LeakyReLU)):
                    layer.inplace = True
        if isinstance(network, ContentNetwork) and precision == "bf16":
            network.features.bfloat16()                          # once, not at each call

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            if isinstance(self.network, Generator):
                return enlarge(self.network, features(self.network, x))
            return self.network(x).float()


def features(generator, lr):
    """Fig. 4 up to the long skip connection: [N, 3, h, w] -> [N, channels, h, w]."""
    x = generator.head(lr)
    return x + generator.fuse(generator.blocks(x))


def enlarge(generator, x):
    """The rest of Fig. 4: [N, channels, h, w] -> SR [N, 3, scale h, scale w].

    PReLU treats each value by itself, so the last shuffle can move behind it, and behind the tail.
    """
    if isinstance(generator.tail, nn.Conv2d):                    # as drawn in Fig. 4
        *layers, shuffle, activation = generator.upsample
        for layer in layers:
            x = layer(x)                                         # [N, 256, 2h, 2w]
        weight, bias, padding = rearranged(generator.tail)
        x = shuffle(F.conv2d(activation(x), weight, bias, padding=padding))
    else:                                                        # by optimize_for_inference
        x = generator.tail(generator.upsample(x))
    return generator.output(x.float())


def rearranged(conv, r=2):
    """(weight, bias, padding) of the convolution that computes conv(F.pixel_shuffle(x, r)) before
    the shuffle: [N, c r^2, h, w] -> [N, n r^2, h, w].

    An SR pixel at one of the r^2 positions within an LR pixel sees fixed positions within the LR
    pixels around it. So k x k weights for c maps, shifted by the position and unshuffled, become
    weights for c r^2 maps: 9x9 from 64 to 3 maps turns into 5x5 from 256 to 12 maps, after which
    3 large maps are shuffled instead of 64.
    """
    k = conv.kernel_size[0]
    p = conv.padding[0]
    reach = math.ceil(p / r)                                     # in LR pixels
    side = r * (2 * reach + 1)                                   # 9x9 weights shift in 10x10
    shifts = range(r * reach - p, r * reach - p + r)
    shifted = []
    for top in shifts:
        for left in shifts:
            margins = (left, side - k - left, top, side - k - top)
            shifted.append(F.pad(conv.weight, margins))          # [3, 64, 10, 10]
    weight = F.pixel_unshuffle(torch.stack(shifted, 1).flatten(0, 1), r)  # [12, 256, 5, 5]
    weight = weight.contiguous(memory_format=torch.channels_last)
    return weight, conv.bias.repeat_interleave(r * r), reach


class FastPReLU(nn.PReLU):
    """PReLU with one slope; on the CPU its gradient takes half as long as torch's.

    An update of SRResNet is 1.04 times as fast in fp32, 1.15 times in bf16.
    """

    def __init__(self, weight):
        super().__init__()
        self.weight = weight                                     # shared with the drawn PReLU

    def forward(self, x):
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return PReLUFunction.apply(x, self.weight)
        return super().forward(x)


class PReLUFunction(torch.autograd.Function):
    """max(0, x) + a min(0, x), and its gradients with respect to x and a."""

    @staticmethod
    def forward(ctx, x, a):
        ctx.save_for_backward(x, a)
        return F.leaky_relu(x, a.item())

    @staticmethod
    def backward(ctx, gradient):
        x, a = ctx.saved_tensors
        slope = x.clamp(max=0).mul_(gradient).sum((2, 3)).to(a.dtype).sum().view_as(a)
        return torch.ops.aten.leaky_relu_backward(gradient, x, a.item(), False), slope


def optimize_for_inference(generator):
    """A frozen copy that computes the same, faster.

    BN is folded into the convolutions, PReLU and sums are computed with them, and the tail is
    rearranged. The copy's forward() is fast, too, and so is what is exported from it.
    """
    generator = copy.deepcopy(generator).eval().requires_grad_(False)
    generator.to(memory_format=torch.channels_last)              # as oneDNN and cuDNN prefer it
    generator.head = fuse(generator.head)
    generator.fuse = fuse(generator.fuse)
    for i, block in enumerate(generator.blocks):
        if isinstance(block, ResidualBlock):
            generator.blocks[i] = FusedResidualBlock(block, keep=i == 0)    # for the long skip

    # The last shuffle moves behind the tail.
    layers = fuse(generator.upsample)
    weight, bias, padding = rearranged(generator.tail)
    tail = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=padding)
    tail.weight = nn.Parameter(weight, requires_grad=False)
    tail.bias = nn.Parameter(bias, requires_grad=False)
    generator.upsample = layers[:-1]
    generator.tail = nn.Sequential(FusedConv(tail), layers[-1])
    for module in generator.modules():
        if isinstance(module, FusedConv):
            module.pack()
    return generator


def fuse(layers):
    """Convolutions, BN, PReLU and shuffles as FusedConv and shuffles."""
    fused = nn.Sequential()
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            conv = FusedConv(layer)
            fused.append(conv)
        elif isinstance(layer, nn.BatchNorm2d):
            conv.conv = nn.utils.fuse_conv_bn_eval(conv.conv, layer)
        elif isinstance(layer, nn.PReLU):
            conv.slope = layer.weight.item()                     # before a shuffle is as good
        else:
            fused.append(layer)
    return fused


class FusedResidualBlock(nn.Module):
    """ResidualBlock in its fast form. keep: do not overwrite the input.

    The activation stays apart. For oneDNN each slope makes another operation, and what it keeps of
    each would lie between large tensors, in gaps that no other fits into: twice the memory.
    """

    def __init__(self, block, keep):
        super().__init__()
        self.first, self.second = fuse(block.body)
        self.slope = self.first.slope
        self.first.slope = None
        self.keep = keep

    def forward(self, x):
        y = self.first(x)
        y = F.leaky_relu(y, self.slope, inplace=not y.requires_grad)
        if self.keep:
            x = x.clone()
        return self.second(y, plus=x)


class FusedConv(nn.Module):
    """A frozen convolution and what follows it: a LeakyReLU of this slope, or a sum.

    On a CPU, oneDNN computes both in one pass, from weights that are packed once. torch has this
    for torch.compile only, in private operators. Where they are missing or refuse, torch computes
    one after the other, with the same result.
    """

    def __init__(self, conv, slope=None):
        super().__init__()
        self.conv = conv
        self.slope = slope
        self.packed = {}                                         # {dtype: (weight, bias)}

    def forward(self, x, plus=None):
        """LeakyReLU(conv(x)), or conv(x) + plus, which may then be overwritten."""
        dtype = x.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        if dtype in self.packed and self.may_fuse(x):
            return self.fused(x, plus, dtype)
        x = self.conv(x)
        if self.slope is not None:
            x = F.leaky_relu(x, self.slope, inplace=not x.requires_grad)
        if plus is not None:
            x = plus + x
        return x

    def may_fuse(self, x):
        """Whether the private operators may serve: they have no gradients and no exported form.

        torch computes small inputs without oneDNN; so does this, for the same rounding.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if x.requires_grad and torch.is_grad_enabled():
            return False
        return x.device.type == "cpu" and x.numel() > 20480

    def fused(self, x, plus, dtype):
        conv = self.conv
        weight, bias = self.packed[dtype]
        layer = (weight, bias, conv.padding, conv.stride, conv.dilation, conv.groups)
        x = x.to(dtype)
        if plus is not None:
            add = torch.ops.mkldnn._convolution_pointwise_.binary
            return add(plus.to(dtype), x, *layer, "add", 1.0, None, [], None)
        convolution = torch.ops.mkldnn._convolution_pointwise
        if self.slope is not None:
            return convolution(x, *layer, "leaky_relu", [self.slope], "")
        return convolution(x, *layer, "none", [], "")

    def pack(self):
        """Pack the weights, and try the operators: before large tensors, or memory has gaps."""
        conv = self.conv
        geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        for dtype in (torch.float32, torch.bfloat16):
            try:
                weight = conv.weight.to(dtype)
                weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry)
                bias = None if conv.bias is None else conv.bias.to(dtype)
                self.packed[dtype] = (weight, bias)
                self.fused(torch.zeros(1, conv.in_channels, 8, 8), None, dtype)
            except (AttributeError, RuntimeError):               # another torch, device or CPU
                self.packed.pop(dtype, None)

    def __getstate__(self):
        """What is copied or saved; packed weights cannot be."""
        return {**self.__dict__, "packed": {}}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.pack()


def pick_device(name="auto"):
    """The torch.device of this name; "auto": the first CUDA GPU or the CPU. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except Exception:                                            # torch raises various types
        raise InputError(f"device {name!r} cannot be used here; use auto or cpu, or, on a machine "
                         "that has it, cuda, cuda:1 or mps") from None


@functools.cache
def pick_precision(device, name="auto"):
    """"fp32" or "bf16"; "auto" measures which of them is faster on this device."""
    if name != "auto":
        return name

    def seconds(dtype):
        x, conv = (thing.to(device, dtype, memory_format=torch.channels_last)
                   for thing in (torch.zeros(4, 64, 64, 64), nn.Conv2d(64, 64, 3, padding=1)))
        with torch.inference_mode():                             # item() waits for the device
            return min(timeit.repeat(lambda: conv(x)[0, 0, 0, 0].item(), number=1, repeat=8,
                                     timer=time.perf_counter))
    try:
        return "bf16" if seconds(torch.bfloat16) < seconds(torch.float32) else "fp32"
    except RuntimeError:                                         # no bf16
        return "fp32"
