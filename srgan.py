"""SRGAN, to be read beside the paper: Ledig et al., "Photo-Realistic Single Image Super-Resolution
Using a Generative Adversarial Network", CVPR 2017, arXiv:1609.04802.

The paper
    1. Networks           generator and discriminator                   Sec. 2.1, Fig. 4
    2. Losses             pixel, content, adversarial, perceptual       Sec. 2.2, Eq. 3 to 6
    3. Training           one step of SRResNet, one step of SRGAN       Eq. 1 and 2, Sec. 3.2
What surrounds it
    4. Data               open images, make LR from HR, draw patches    Sec. 3.2
    5. Metrics            PSNR, SSIM, LPIPS                             Sec. 3.1
    6. Upscaling          whole images, in tiles that leave no trace
    7. Checkpoints        what train.py writes and every script reads
    8. Beyond the paper   initialisation, networks, losses, penalties
    9. Speed              the same mathematics, computed faster

Sections 1 to 3 follow the paper; every addition is marked. G and D are the generator and the
discriminator, LR is a low-resolution image, HR the original that it was made from, and SR = G(LR)
the generator's estimate of HR. Tensors are float32 [N, 3, height, width], RGB: LR [N, 3, h, w] in
[0, 1], HR and SR [N, 3, H, W] in [-1, 1] (Sec. 3.2). Other images are uint8 arrays [h, w, 3].
`python srgan.py` builds both networks and takes a step of each stage on random patches.
"""
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
import warnings
from collections import Counter, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin
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
            nn.Conv2d(n, n, 3, padding=1, bias=False),            # k3n64s1; BN adds a bias
            nn.BatchNorm2d(n),
            nn.PReLU(),                                           # one slope for all maps
            nn.Conv2d(n, n, 3, padding=1, bias=False),            # k3n64s1
            nn.BatchNorm2d(n))

    def forward(self, x):
        return x + self.body(x)                                   # elementwise sum


class Generator(nn.Module):
    """G, Fig. 4 top: LR [N, 3, h, w] in [0, 1] -> SR [N, 3, scale h, scale w] in [-1, 1].

                                                     k3n64s1, BN
        LR ─── head ───┬─── 16 residual blocks ─── fuse ─── + ─── upsample, twice ─── tail ─── SR
             k9n64s1,  │                                    │     k3n256s1,           k9n3s1
             PReLU     └───────────── long skip ────────────┘     shuffle, PReLU

    scale: the paper's r, 2, 4 or 8. channels: n64. n_blocks: the paper's B. 1,547,350 parameters.
    tanh, beyond the paper: end with a Tanh, which keeps SR in [-1, 1], as most programs do.
    """
    block = "residual"                                            # its name in GENERATORS (sec. 8)

    def __init__(self, scale=4, channels=64, n_blocks=16, tanh=False):
        super().__init__()
        self.arch = {"scale": scale, "channels": channels, "n_blocks": n_blocks, "tanh": tanh,
                     "block": self.block}                         # saved with the weights (sec. 7)
        n = channels
        self.head = nn.Sequential(
            nn.Conv2d(3, n, 9, padding=4), nn.PReLU())            # k9n64s1, PReLU
        self.blocks = nn.Sequential(
            *[ResidualBlock(n) for _ in range(n_blocks)])         # B residual blocks
        self.fuse = nn.Sequential(
            nn.Conv2d(n, n, 3, padding=1, bias=False),            # k3n64s1
            nn.BatchNorm2d(n))
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
        return self.output(self.tail(x))                          # [N, 3, 4h, 4w]


class Discriminator(nn.Module):
    """D, Fig. 4 bottom: [N, 3, H, W] in [-1, 1] -> logits [N]. The losses apply its sigmoid.

    patch_size: H and W; the dense layer fits no other size. 23,563,649 parameters at 96.
    """

    def __init__(self, patch_size=96):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1), nn.LeakyReLU(0.2),    # k3n64s1
            discriminator_block(64, 64, stride=2),                # k3n64s2
            discriminator_block(64, 128, stride=1),               # k3n128s1
            discriminator_block(128, 128, stride=2),              # k3n128s2
            discriminator_block(128, 256, stride=1),              # k3n256s1
            discriminator_block(256, 256, stride=2),              # k3n256s2
            discriminator_block(256, 512, stride=1),              # k3n512s1
            discriminator_block(512, 512, stride=2))              # k3n512s2
        side = math.ceil(patch_size / 16)                         # halved four times: 96 -> 6
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(512 * side * side, 1024),     # dense 1024
            nn.LeakyReLU(0.2), nn.Linear(1024, 1))                # dense 1

    def forward(self, x):                                         # [N, 3, 96, 96] in [-1, 1]
        x = self.features(x)                                      # [N, 512, 6, 6]
        return self.classifier(x).squeeze(1)                      # [N]


def discriminator_block(n_in, n, stride, norm=nn.BatchNorm2d):
    """Fig. 4 bottom: a 3x3 convolution, BN, LeakyReLU of slope 0.2. norm: section 8 has others."""
    conv = nn.Conv2d(n_in, n, 3, stride, padding=1, bias=False)   # BN adds a bias
    return nn.Sequential(conv, norm(n, affine=True), nn.LeakyReLU(0.2))


# ==================================================================================================
# 2. Losses. Sec. 2.2, Eq. 3 to 6. Where the paper sums, these are means: see each docstring.
# ==================================================================================================

def mse_loss(sr, hr):
    """Eq. 4, l_MSE: mean of (HR - SR)^2 over pixels, and colours. [N, 3, H, W] twice -> scalar."""
    return (hr - sr).square().mean()                              # Eq. 4


class ContentNetwork(nn.Module):
    """A frozen network's feature maps phi: [N, 3, H, W] in [-1, 1] -> [N, C, h, w].

    Sec. 3.2 scales the feature maps by 1/12.75, so that the VGG loss has the scale of the MSE; this
    multiplies Eq. 5 by about 0.006. The input is normalised as torchvision's networks expect it.
    """

    def __init__(self, features, divisor=12.75):
        super().__init__()
        self.features = features.eval().requires_grad_(False)
        self.divisor = divisor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, x):                                         # [N, 3, H, W] in [-1, 1]
        x = ((x + 1) / 2 - self.mean) / self.std
        return self.features(x).float() / self.divisor            # float: may be bf16 (section 9)


class TruncatedVGG19(ContentNetwork):
    """phi(i,j) of Eq. 5: VGG19's j-th convolution, after its activation, before the i-th pooling.

    layer: "2_2" is the paper's VGG22, "5_4" its VGG54: [N, 3, 96, 96] -> [N, 512, 6, 6].
    weights: "imagenet" (torchvision's, downloaded on first use), a file in torchvision's layout
    that holds at least the layers needed, or "random" (seeded, for tests). divisor: see
    ContentNetwork; weights/README.md says which VGG19 it suits. Raises InputError (section 4).
    """
    layers = ("1_1", "1_2", "2_1", "2_2", "3_1", "3_2", "3_3", "3_4",
              "4_1", "4_2", "4_3", "4_4", "5_1", "5_2", "5_3", "5_4")

    def __init__(self, layer="5_4", weights="imagenet", divisor=12.75):
        features = nn.Sequential()
        n_in = 3
        for name in self.layers[:self.layers.index(layer) + 1]:
            i, j = map(int, name.split("_"))
            n = min(32 * 2 ** i, 512)                             # 64, 128, 256, 512, 512 maps
            if i > 1 and j == 1:
                features.append(nn.MaxPool2d(2))
            features.extend([nn.Conv2d(n_in, n, 3, padding=1), nn.ReLU()])
            n_in = n
        load_features(features, weights, VGG19_URL)               # section 7
        super().__init__(features, divisor)


def content_loss(phi, sr, hr):
    """Eq. 5, l_VGG/i,j: mean of (phi(HR) - phi(SR))^2. [N, 3, H, W] in [-1, 1] twice -> scalar.

    phi: a ContentNetwork. The mean includes the feature maps, so that a weight means the same for
    every layer. Eq. 5 sums over the maps instead: it is 128 times as large for VGG22, 512 times
    for VGG54.
    """
    return (phi(hr) - phi(sr)).square().mean()                    # Eq. 5


def adversarial_loss(D, sr):
    """Eq. 6, l_Gen: -log D(SR), the mean over the batch, not its sum. SR [N, 3, H, W] -> scalar.

    By Eq. 2, G would minimise log(1 - D(SR)), whose gradient vanishes while D recognises SR with
    confidence (Sec. 2.2.2). Here D returns logits; the paper's D(SR) is their sigmoid.
    """
    return -F.logsigmoid(D(sr)).mean()                            # Eq. 6: -log D(SR)


def perceptual_loss(l_x, l_gen, weight=1e-3):
    """Eq. 3, l^SR: content loss (Eq. 4, 5) + 10^-3 adversarial loss (Eq. 6). Scalars -> scalar."""
    return l_x + weight * l_gen                                   # Eq. 3


# ==================================================================================================
# 3. Training. Stage 1: SRResNet minimises a content loss alone (Eq. 1). Stage 2: SRGAN starts from
#    SRResNet; D and G play the game of Eq. 2, in which G minimises the perceptual loss of Eq. 3.
# ==================================================================================================

def srresnet_step(G, adam, content, lr, hr):
    """Stage 1: one step of Eq. 1. Update G to reduce l^SR, here a content loss alone.

    content: a function of SR and HR; in the paper, Eq. 4.
    lr: [N, 3, h, w] in [0, 1]; hr: [N, 3, 4h, 4w] in [-1, 1]. Returns {"loss": l^SR}.
    """
    sr = G(lr)                                                    # [N, 3, 4h, 4w]
    l_sr = content(sr, hr)                                        # Eq. 4
    minimize(l_sr, adam)                                          # Eq. 1
    return {"loss": l_sr}


def discriminator_loss(real, fake):
    """D's side of Eq. 2, negated so that it is minimised. real, fake: D's logits of HR, SR, [N].

    The paper's D(HR) is sigmoid(real), and its 1 - D(SR) is 1 - sigmoid(fake) = sigmoid(-fake).
    """
    return -F.logsigmoid(real).mean() - F.logsigmoid(-fake).mean()  # -log D(HR) - log(1 - D(SR))


def discriminator_step(D, adam, sr, hr, d_loss=discriminator_loss, penalty=None):
    """One step of D (Eq. 2). sr, detached from G, and hr: [N, 3, 4h, 4w] in [-1, 1].

    Beyond the paper: another d_loss; penalty, a function of SR and HR. Returns "discriminator",
    D's loss, and "d_real" and "d_fake", its mean logits for HR and SR.
    """
    D.requires_grad_(True)
    real = D(hr)                                                  # [N]; two passes, because batch
    fake = D(sr)                                                  # [N]  norm must not mix HR and SR
    loss = d_loss(real, fake)                                     # Eq. 2, the max over D
    if penalty is not None:
        loss = loss + penalty(sr, hr)
    minimize(loss, adam)
    D.requires_grad_(False)                                       # D is frozen while G learns
    return {"discriminator": loss, "d_real": real.mean(), "d_fake": fake.mean()}


def srgan_step(G, D, adam_G, adam_D, content, lr, hr, weight=1e-3, g_loss=adversarial_loss,
               d_loss=discriminator_loss, penalty=None):
    """Stage 2: one step of D, then one step of G against the new D (Sec. 3.2: k = 1).

    content: a function of SR and HR; in the paper, Eq. 5. weight: of the adversarial loss in Eq. 3.
    lr: [N, 3, h, w] in [0, 1]; hr: [N, 3, 4h, 4w] in [-1, 1]. Beyond the paper: g_loss, a function
    of D and SR in place of Eq. 6; d_loss and penalty, see discriminator_step. Returns what that
    returns, "loss" (l^SR) and "adversarial" (l_Gen).
    """
    sr = G(lr)                                                    # [N, 3, 4h, 4w], for both steps

    # D learns to tell HR from SR.
    losses = discriminator_step(D, adam_D, sr.detach(), hr, d_loss, penalty)

    # G learns to bring SR closer to HR in the feature maps phi, and to make D take SR for HR. Eq. 6
    # replaces G's side of Eq. 2, see adversarial_loss.
    l_x = content(sr, hr)                                         # Eq. 5
    l_gen = g_loss(D, sr)                                         # Eq. 6
    l_sr = perceptual_loss(l_x, l_gen, weight)                    # Eq. 3
    minimize(l_sr, adam_G)                                        # Eq. 1
    losses["loss"] = l_sr
    losses["adversarial"] = l_gen
    return losses


def minimize(loss, adam):
    """One update by an Adam that the caller made (Sec. 3.2: beta1 = 0.9, learning rate 1e-4)."""
    adam.zero_grad()
    loss.backward()
    adam.step()


# ==================================================================================================
# 4. Data. Sec. 3.2: LR is HR, reduced by the bicubic kernel; LR is scaled to [0, 1], HR to [-1, 1].
# ==================================================================================================

SCALES = (2, 4, 8)
# What open_image reads, by Pillow's names: not EPS, PDF and WMF, which start or embed programs.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "HEIF", "JXL",
           "JPEG2000", "QOI", "PSD", "ICO", "DDS", "TGA")
INSTALL = {".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif",
           ".jxl": "pillow-jxl-plugin", ".avif": "'pillow>=11.3'"}   # what reads these endings
EXIF_IFDS = (0x8769, 0x8825)                                     # exposure, position
EXIF_KEPT = (270, 271, 272, 305, 306, 315, 33432, *EXIF_IFDS)    # texts, such as the copyright
SRGB = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)         # a PNG's cHRM: white, R, G, B
STORE_LIMIT = 32 * 2 ** 30                                       # bytes; larger data is streamed
SYMMETRIES = {"none": [0], "flip": [0, 1], "all": list(range(8))}  # bits: see cut_square


class InputError(ValueError):
    """An error that the user can fix. Its text is one line: what is wrong and what to do."""


def say(text):
    print(text, file=sys.stderr)


def one_line(error):
    """An exception's text, shortened to fit into a message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@functools.cache
def readable_formats():
    """{ending: Pillow's name of the format}; with HEIC and JPEG XL if their plug-ins are there."""
    with contextlib.suppress(ImportError):
        import pillow_heif
        pillow_heif.register_heif_opener()
    with contextlib.suppress(ImportError):
        import pillow_jxl                                        # noqa: F401; registers itself
    known = Image.registered_extensions()
    return {ending: name for ending, name in known.items() if name in FORMATS}


def find_images(path):
    """Sorted paths of the images in a folder and its subfolders, or one file. Raises InputError.

    Links to folders are followed, but each folder is entered once. Hidden files and folders are
    left out, and @eaDir, which holds thumbnails. A line counts the other files that are skipped.
    """
    if os.path.isfile(path):
        return [Path(path)]
    found = []
    skipped = Counter()
    entered = set()
    for folder, subfolders, names in os.walk(path, followlinks=True):
        is_hidden = os.path.basename(folder).startswith((".", "@eaDir")) and folder != str(path)
        if is_hidden or os.path.realpath(folder) in entered:
            subfolders.clear()
            continue
        entered.add(os.path.realpath(folder))
        for file in [Path(folder, name) for name in names if not name.startswith(".")]:
            ending = file.suffix.lower()
            if ending in readable_formats() and file.is_file():
                found.append(file)
            elif ending in INSTALL:
                skipped[f"{ending} (pip install {INSTALL[ending]})"] += 1
            else:
                skipped[ending or "without an ending"] += 1
    if skipped:
        kinds = ", ".join(f"{n} {kind}" for kind, n in skipped.most_common())
        say(f"{path}: skipped {skipped.total()} files that cannot be read as images: {kinds}")
    if not found:
        problem = "no images in this folder" if entered else "no such file or folder"
        raise InputError(f"{path}: {problem}")
    return sorted(found)


def identify(file):
    """PIL.Image.open for FORMATS: an image whose format and size are known, not yet its pixels."""
    readable_formats()                                           # registers the plug-ins
    return Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])


def to_srgb(image):
    """Convert to sRGB by the image's ICC profile: CMYK to "RGB"; "L", "LA", "RGB", "RGBA" stay."""
    try:
        profile = io.BytesIO(image.info["icc_profile"])
        colours = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"),
                                            outputMode="RGB")
    except Exception:                                            # no profile, or a broken one
        colours = image.convert("RGB")
    if image.mode in ("L", "LA"):
        colours = colours.convert("L")
    if image.mode in ("LA", "RGBA"):
        colours.putalpha(image.getchannel("A"))
    return colours


def to_8_bits(image, raw):
    """Convert a PIL.Image of any mode to "L", "LA", "RGB" or "RGBA". Raises InputError.

    raw: Pillow's name for the pixels in the file; 16-bit grey with alpha has the mode "RGBA".
    """
    tags = getattr(image, "tag_v2", {})                          # of a TIFF
    bits = max(tags.get(258, [8]))
    kind = {1: "unsigned", 2: "signed"}.get(max(tags.get(339, [1])), "floating-point")
    if image.mode == "F" or kind != "unsigned" or bits not in (1, 2, 4, 8, 16):
        raise InputError(f"its pixels are {bits}-bit and {kind}; convert it to 8 bits, unsigned")
    if bits == 16 and tags.get(262) == 0:
        raise InputError("its pixels are 16-bit, and 0 is white; convert it to 8 bits")
    if bits == 16 and tags.get(284) == 2 and tags.get(259) == 1:
        raise InputError("its 16-bit colours are stored plane by plane; convert it to 8 bits")
    if image.mode.startswith("I"):                               # 16-bit grey: 65535 / 257 = 255
        pixels = np.asarray(image, np.int32)
        grey = Image.fromarray(np.uint8((pixels + 128) // 257))
        if "transparency" in image.info:
            visible = pixels != image.info["transparency"]
            grey.putalpha(Image.fromarray(np.uint8(255 * visible)))
        return grey
    if image.mode == "CMYK":
        return to_srgb(image)
    mode = "RGB"
    if image.mode in ("1", "L", "LA") or raw == "LA;16B":
        mode = "L"
    if image.has_transparency_data:
        mode += "A"
    if image.mode == mode:                                       # a copy would double the memory
        return image
    return image.convert(mode)


def upright(exif):
    """EXIF bytes as they are, but with orientation (tag 274) 1, as the image has been turned."""
    exif = b"Exif\0\0" + exif.removeprefix(b"Exif\0\0")          # some files lack it
    little, big = b"\x12\1\3\0\1\0\0\0", b"\1\x12\0\3\0\0\0\1"
    exif = re.sub(little + b"[^\0]\0", little + b"\1\0", exif, count=1)
    return re.sub(big + b"\0[^\0]", big + b"\0\1", exif, count=1)


def exif_to_rewrite(exif):
    """Strip a PIL.Image.Exif to EXIF_KEPT, its texts as bytes, for Pillow would write é as "?"."""
    for tag in {*exif} - {*EXIF_KEPT}:
        del exif[tag]
    for tag, value in exif.items():
        if isinstance(value, str):
            exif[tag] = value.encode("latin-1")
    return exif


def info_to_keep(image, exif):
    """What the result keeps: "icc_profile", "dpi", "exif", "xmp", and a PNG's "text".

    exif: the bytes in the file, or None where they are part of it (TIFF) or a text (some PNGs).
    """
    info = {"text": {}}
    for key in ("icc_profile", "dpi", "xmp"):
        if image.info.get(key):
            info[key] = image.info[key]
    if image.mode == "CMYK":                                     # has become sRGB
        info.pop("icc_profile", None)
    if not all(0 < dots < 1e5 for dots in info.get("dpi", ())):  # 0/0 in some TIFFs
        del info["dpi"]
    with contextlib.suppress(Exception):                         # broken EXIF raises anything
        if exif:
            Image.Exif().load(exif)                              # raises it
            info["exif"] = upright(exif)
        elif exif_to_rewrite(image.getexif()):
            info["exif"] = image.getexif().tobytes()
    for key in ("exif", "xmp"):
        if len(info.get(key, b"")) > 65_000:                     # JPEG's limit
            del info[key]
    for key, text in getattr(image, "text", {}).items():
        if not key.startswith(("XML:com.adobe.xmp", "Raw profile type")):    # XMP, EXIF ...
            info["text"][key] = text
    return info


def notes_on(image):
    """Sentences on what is left behind of an image, or may look different."""
    notes = []
    with contextlib.suppress(Exception):                         # broken frames raise anything
        if image.format != "PSD" and getattr(image, "n_frames", 1) > 1 or image.info.get("aux"):
            notes.append("only its first picture is kept, without other frames, pages, gain maps")
    is_defined = "icc_profile" in image.info or "srgb" in image.info
    chromaticity = np.subtract(image.info.get("chromaticity", SRGB), SRGB)
    gamma = image.info.get("gamma", 1 / 2.2) - 1 / 2.2
    if not is_defined and max(abs(gamma), *abs(chromaticity)) > 0.02:
        notes.append("its colours may look different, as gAMA and cHRM are not applied")
    return notes


def open_image(path):
    """Decode an image: a PIL.Image of mode "L", "LA", "RGB" or "RGBA", 8 bits, upright.

    EXIF orientation is applied. Palettes become RGB or RGBA, CMYK becomes sRGB by its ICC profile,
    16 bits become 8, and an animation becomes its first frame. `info` holds what info_to_keep
    says, "notes" of notes_on, and "lossless". Raises InputError if the image cannot be read.
    """
    ending = Path(path).suffix.lower()
    try:
        # Not by its path: Pillow would map a plain TIFF into memory and leave it unrotated.
        with open(path, "rb") as file:
            with identify(file) as source:
                notes = notes_on(source)
                raw = source.tile[0][3] if source.tile else ""
                source.load()                                    # turns a TIFF upright
                exif = source.info.get("exif")                   # exif_transpose rewrites it
                with contextlib.suppress(Exception):             # broken EXIF
                    ImageOps.exif_transpose(source, in_place=True)
                image = to_8_bits(source, raw)
                image.info = info_to_keep(source, exif)
                image.info["notes"] = notes
                file.seek(0)
                image.info["lossless"] = source.format == "WEBP" and b"VP8L" in file.read(2 ** 16)
                return image
    except Image.DecompressionBombError:
        raise InputError(f"{path}: more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.4g} megapixels; "
                         "upscale.py accepts it with a higher --max-megapixels") from None
    except Image.UnidentifiedImageError:
        reason = "its content is in none of the formats that can be read"
        if ending in INSTALL and ending not in readable_formats():
            reason = f"to read it, pip install {INSTALL[ending]}"
        elif readable_formats().get(ending) == "TIFF":
            reason = "a TIFF with other pixels than integers of up to 16 bits; convert it"
        raise InputError(f"{path}: cannot be read as an image ({reason})") from None
    except Exception as error:                                   # broken files raise anything
        raise InputError(f"{path}: cannot be read as an image ({one_line(error)})") from None


def open_rgb(path):
    """Decode an image to a uint8 array [h, w, 3]; transparency is dropped. Raises InputError."""
    image = open_image(path)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.array(image)


def to_tensor(pixels):
    """uint8 [..., h, w, 3], array or tensor -> float32 [..., 3, h, w] in [0, 1]."""
    return torch.as_tensor(pixels).movedim(-1, -3).float().div(255)


def to_pixels(sr):
    """[..., 3, H, W] in [-1, 1] -> uint8 [..., H, W, 3], to the nearest grey level."""
    return sr.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)


def weighted_sums(x, taps, dim, stride=1):
    """Sums of len(taps) neighbours along `dim`, weighted by taps, at every stride-th position.

    Products and a sum, because some libraries round the factors of a convolution (TF32).
    """
    return (x.unfold(dim, len(taps), stride) * taps).sum(-1)


def bicubic_taps(scale):
    """The bicubic kernel (Keys 1981, a = -0.5), stretched by scale: 4 scale weights, sum 1.

    They are multiples of a power of two (2^-12 at scale 4), so that float32 holds them exactly.
    """
    distance = (torch.arange(4 * scale) - 2 * scale + 0.5).abs() / scale       # in LR pixels
    near = 1.5 * distance ** 3 - 2.5 * distance ** 2 + 1                       # from 0 to 1
    far = -0.5 * distance ** 3 + 2.5 * distance ** 2 - 4 * distance + 2        # from 1 to 2
    return torch.where(distance < 1, near, far) / scale


def gaussian_taps(scale):
    """A Gaussian of sigma 0.4 scale (Sec. 2 gives no sigma), as far as 3 to 4 sigma; sum 1."""
    n = scale + 2 * (5 * scale // 4)                             # LR pixel and 1.25 on each side
    return gaussian(n, 0.4 * scale)


def gaussian(n, sigma):
    """n weights exp(-d^2 / 2 sigma^2), d from the centre, divided by their sum. -> float64 [n]"""
    distance = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    return torch.softmax(-distance ** 2 / (2 * sigma ** 2), dim=0)


KERNELS = {"bicubic": bicubic_taps, "gaussian": gaussian_taps}   # name: weights for a scale


def kernel_reach(kernel, scale):
    """How far an LR pixel sees beyond its own HR pixels: in HR pixels, on each side."""
    return (len(KERNELS[kernel](scale)) - scale) // 2


def downsample(hr, scale=4, kernel="bicubic"):
    """LR from HR (Sec. 3.2): [N, 3, H, W] in [0, 1] -> [N, 3, H/scale, W/scale], also in [0, 1].

    kernel: "bicubic" (Sec. 3.2) or "gaussian" (Sec. 2). The image is reduced vertically first and
    rounded to 8 bits (half up), then horizontally and rounded again. Pixels outside the image
    repeat its border. "bicubic" gives the LR images of Set5, Set14, BSD100 and Urban100 bit for
    bit. Raises ValueError unless H and W are multiples of scale.
    """
    h, w = hr.shape[2:]
    if h % scale or w % scale:
        raise ValueError(f"{h}x{w} is not a multiple of {scale}")
    taps = KERNELS[kernel](scale).to(hr, non_blocking=True)      # does not wait for the GPU
    border = [kernel_reach(kernel, scale)] * 4
    x = F.pad(hr.contiguous(), border, mode="replicate")
    x = (x * 255).round() - 128                                  # so small that float32 sums are
    for dim in (2, 3):                                           # exact at every scale
        x = weighted_sums(x, taps, dim, scale)
        x = (x + 0.5).floor().clamp(-128, 127)
    return (x + 128) / 255


def interpolate(lr, scale=4, method=Image.Resampling.BICUBIC):
    """The baselines, bicubic or nearest: uint8 [h, w, 3] -> uint8 [scale h, scale w, 3]."""
    h, w = lr.shape[:2]
    return np.array(Image.fromarray(lr).resize((w * scale, h * scale), method))


# What the name of an LR image may have behind the name of its HR image; {} is the scale.
LR_ENDINGS = ("_LR", "x{}", "_x{}", "_LRx{}", "_LR_x{}", "_LR{}", "_bicLRx{}", "_LRBI_x{}")


def by_stem(paths, folder=None):
    """{stem: path}. The stem is the name without its ending or, given `folder`, the path below it.

    Raises InputError if two images have the same stem.
    """
    found = {}
    for path in paths:
        stem = path.stem
        if folder is not None:
            stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise InputError(f"{path} and {found[stem]} have the same name; keep one of them")
        found[stem] = path
    return found


def name_of(stem):
    """The stem of an HR image without the endings that say so: a_HR and a_HR_x4 become a."""
    return re.sub(r"_HR(_?x[248])?$", "", stem)


def lr_names(stem, scale):
    """The stems that the LR image of the HR image `stem` may have."""
    names = [stem]
    for ending in LR_ENDINGS:
        names.append(name_of(stem) + ending.format(scale))
    return names


def find_hr(folder):
    """Paths of the HR images in a folder or its HR/. Raises InputError if some are LR images."""
    folder = Path(folder)
    if (folder / "HR").is_dir():
        folder = folder / "HR"
    paths = find_images(folder)
    stems = {os.path.splitext(path)[0] for path in paths}
    for path in paths:
        # An LR image is in a folder such as LR_bicubic or X4, or beside its HR image.
        below = str(path)[len(str(folder)):]
        mixed = re.search(r"[\\/](LR[^\\/]*|X[2348])[\\/]", below, re.I)
        for scale in SCALES:
            names = lr_names(os.path.splitext(path)[0], scale)[1:]
            mixed = mixed or not stems.isdisjoint(names)
        if mixed:
            raise InputError(f"{folder} also holds LR images (see {path}); put HR and LR images "
                             "into separate folders, and give the one with HR")
    return paths


def find_pairs(folder, lr_folder=None, scale=4, kernel="bicubic"):
    """[(stem, HR path, LR path or None)] of a folder of HR images, sorted by stem.

    The folder may also hold HR/ and, beside it, LR_<kernel>_x<scale>/ or LR_<kernel>/X<scale>/;
    lr_folder names LR images that are elsewhere. LR images have the name of their HR image, or
    that name and one of LR_ENDINGS. Where HR images in different subfolders have the same name,
    stems are paths, such as 000/00000001, and LR images are in subfolders of the same names.
    Raises InputError if two images have the same stem, or if an HR image has no LR image.
    """
    hr_folder = Path(folder)
    if (hr_folder / "HR").is_dir():
        hr_folder = hr_folder / "HR"
        for usual in (f"LR_{kernel}_x{scale}", f"LR_{kernel}/X{scale}"):
            if lr_folder is None and Path(folder, usual).is_dir():
                lr_folder = Path(folder, usual)

    # HR by stem. Names alone are enough if they differ: HR and LR may then be sorted differently.
    paths = find_hr(hr_folder)
    by_path = len({path.stem for path in paths}) < len(paths)
    hr = by_stem(paths, hr_folder if by_path else None)
    if lr_folder is None:
        return [(stem, path, None) for stem, path in sorted(hr.items())]

    # LR for each of them.
    lr = by_stem(find_images(lr_folder), lr_folder if by_path else None)
    pairs = []
    for stem, path in sorted(hr.items()):
        names = [name for name in lr_names(stem, scale) if name in lr]
        if not names:
            raise InputError(f"{path}: {lr_folder} holds no image of this name")
        pairs.append((stem, path, lr[names[0]]))
    return pairs


def split(pairs, shares=(80, 15, 5), validate_on=0):
    """{"train", "val", "test"}: the pairs of find_pairs, divided by percentages.

    The order is that of the SHA-256 of the HR file names, the same on every machine. val and test
    get at least one image unless their share is 0. If validate_on is not 0, it limits val; the
    rest of val joins train.
    """
    def rank(pair):
        path = pair[1]
        return hashlib.sha256(os.fsencode(path.name)).digest(), path.as_posix()

    # In this order: val, what validate_on takes from it, test, train.
    ranked = sorted(pairs, key=rank)
    sizes = []
    for share in shares[1:]:
        sizes.append(max(len(ranked) * share // 100, int(share > 0)))
    val, test = sizes
    held_out = min(val, validate_on or val)
    parts = {"train": ranked[held_out:val] + ranked[val + test:],
             "val": ranked[:held_out],
             "test": ranked[val:val + test]}
    for part in parts.values():
        part.sort(key=lambda pair: pair[1])
    return parts


def open_pair(hr_path, lr_path=None, scale=4, kernel="bicubic"):
    """(LR, HR), uint8 [h, w, 3]: HR cropped to a multiple of scale; LR made from it if not given.

    Raises InputError if an image cannot be read or the sizes do not match.
    """
    hr = open_rgb(hr_path)
    h = hr.shape[0] // scale
    w = hr.shape[1] // scale
    if min(h, w) == 0:
        raise InputError(f"{hr_path}: {hr.shape[1]}x{hr.shape[0]} is smaller than one LR pixel")
    hr = hr[:h * scale, :w * scale]
    if lr_path is None:
        lr = downsample(to_tensor(hr)[None], scale, kernel)      # [1, 3, h, w] in [0, 1]
        return to_pixels(lr * 2 - 1)[0].numpy(), hr
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
        self.paths = list(paths)
        self.pixels = None                                       # if the images are not stored
        self.sizes = None
        if mode == "never":
            return

        # The file that holds these images, as they are now.
        key = []
        for path in self.paths:
            stat = os.stat(path)
            key.append((os.path.abspath(path), stat.st_size, stat.st_mtime_ns))
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:20]
        file = Path(cache, f"{name}.pixels")
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):                           # another process may be writing it
            if file.exists() and self.open(file):
                return
            if mode == "auto" and self.is_too_large(cache):
                return
            self.decode(file)
            self.open(file)

    def open(self, file):
        """Map the file into memory. Returns False if it is not whole."""
        n_sizes = 16 * len(self.paths)
        if file.stat().st_size < n_sizes:
            return False
        mapped = np.memmap(file, np.uint8, "c")                  # copy-on-write, as torch requires
        sizes = mapped[-n_sizes:].view(np.int64).reshape(-1, 2)  # heights and widths
        n_pixels = sizes.prod(1)
        if (sizes < 0).any() or 3 * n_pixels.sum() + n_sizes != len(mapped):
            return False
        self.sizes = np.array(sizes)
        self.start = np.cumsum(n_pixels) - n_pixels              # of each image, in pixels
        self.pixels = torch.from_numpy(mapped[:-n_sizes]).view(-1, 3)
        return True

    def is_too_large(self, cache):
        """Whether the pixels would not fit, as estimated from the headers of up to 100 images."""
        sample = self.paths[::len(self.paths) // 100 + 1]
        n_bytes = 0
        for path in sample:
            with contextlib.suppress(Exception), identify(path) as image:
                n_bytes += 3 * image.width * image.height
        n_bytes *= len(self.paths) / len(sample)
        too_large = n_bytes > min(STORE_LIMIT, shutil.disk_usage(cache).free / 2)
        if too_large:
            say(f"about {n_bytes / 2 ** 30:.1f} GiB of pixels do not fit into {cache}; images are "
                "decoded each time they are needed")
        return too_large

    def decode(self, file):
        """Write to `file` the pixels of all images, one after another, and then their sizes."""
        sizes = []
        try:
            with replacing(file) as temporary, open(temporary, "wb") as output:
                for image in decode_ahead(self.paths):
                    output.write(image)
                    sizes.append(image.shape[:2])
                output.write(np.array(sizes, np.int64))
        except OSError as error:
            raise InputError(f"{file.parent}: cannot hold the decoded pixels ({one_line(error)}); "
                             "name another folder with --cache, or use --set store=never") from None

    def __getitem__(self, i):
        """Raises InputError if the image has to be decoded and is unreadable."""
        if self.pixels is None:
            return torch.from_numpy(open_rgb(self.paths[i]))
        h, w = self.sizes[i]
        return self.pixels[self.start[i]:self.start[i] + h * w].view(h, w, 3)


def decode_ahead(paths):
    """Yield uint8 [h, w, 3] of each path, [0, 0, 3] if it is unreadable; shows a progress bar.

    Threads decode a few images ahead, at most 8, to bound the memory.
    """
    n_threads = min(4, os.cpu_count() or 1)
    waiting = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        for path in tqdm(paths, desc="decoding once", disable=None):
            waiting.append(pool.submit(decode_or_none, path))
            if len(waiting) == 2 * n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def decode_or_none(path):
    """uint8 [h, w, 3], or [0, 0, 3] if the image is unreadable."""
    try:
        return open_rgb(path)
    except InputError:
        return np.empty((0, 0, 3), np.uint8)


class Patches(torch.utils.data.Dataset):
    """Training patches with a margin: patches[image, place, symmetry] is a window of an image.

    hr, lr: Stores; without lr, LR is made from HR by `kernel`. patch_size: the side of the HR
    patches, a multiple of scale. crop_margin: the share of the height and width, 0 to below 0.5,
    that patches keep clear of at each border. `usable` lists the images that can be drawn: those
    that are unreadable or too small are left out, and a message says so. Raises InputError if none
    is left.
    """

    def __init__(self, hr, patch_size=96, scale=4, kernel="bicubic", crop_margin=0.0, lr=None):
        self.hr = hr
        self.lr = lr
        self.scale = scale
        self.kernel = kernel
        self.crop_margin = crop_margin
        self.margin = math.ceil(kernel_reach(kernel, scale) / scale)  # in LR pixels
        self.window = patch_size + 2 * self.margin * scale       # in HR pixels
        self.usable = np.arange(len(hr.paths))
        if hr.pixels is not None:                                # otherwise it shows when decoded
            large = (hr.sizes >= self.window).all(axis=1)
            self.usable = np.flatnonzero(large)
            left_out = [str(hr.paths[i]) for i in np.flatnonzero(~large)]
            if left_out:
                say(f"left out {len(left_out)} of {len(hr.paths)} images, unreadable or smaller "
                    f"than {self.window}x{self.window}, such as {', '.join(left_out[:3])}")
        if len(self.usable) == 0:
            raise InputError(f"no image is {self.window}x{self.window} or larger, the size of a "
                             f"patch of {patch_size} with its margin; use larger images or a "
                             "smaller patch_size")

    def __getitem__(self, drawn):
        """(windows of HR and, if given, LR, uint8 [w, w, 3]; messages about images left out).

        drawn: (image, [y, x] in [0, 1), symmetry). An image that cannot be used is replaced by the
        next one that can.
        """
        image, place, symmetry = drawn
        messages = []
        for i in range(10):
            try:
                return self.cut((image + i) % len(self.hr.paths), place, symmetry), messages
            except InputError as error:
                messages.append(f"left out: {error}")
        return None, messages

    def cut(self, image, place, symmetry):
        """The window of HR and, if there is an LR store, of LR. Raises InputError."""
        hr = self.hr[image]
        size = np.array(hr.shape[:2])

        # Where the window's corner may be, in LR pixels: from margin to free - margin.
        free = size // self.scale - self.window // self.scale
        if free.min() < 0:
            raise InputError(f"{self.hr.paths[image]}: smaller than {self.window}x{self.window}")
        margin = (self.crop_margin * size / self.scale).astype(np.int64)
        margin = np.minimum(margin, free // 2)                   # one place is always left
        corner = margin + (place * (free - 2 * margin + 1)).astype(np.int64)

        windows = [cut_square(hr, corner * self.scale, self.window, symmetry)]
        if self.lr is not None:
            lr = self.lr[image]
            if lr.shape[:2] != tuple(size // self.scale):
                raise InputError(f"{self.lr.paths[image]}: not 1/{self.scale} of its HR image's "
                                 "size")
            windows.append(cut_square(lr, corner, self.window // self.scale, symmetry))
        return windows


def cut_square(image, corner, side, symmetry):
    """[h, w, 3] -> [side, side, 3]. Bits of symmetry: flip left-right, flip up-down, transpose."""
    y, x = corner
    patch = image[y:y + side, x:x + side]
    if symmetry & 1:
        patch = patch.flip(1)
    if symmetry & 2:
        patch = patch.flip(0)
    if symmetry & 4:
        patch = patch.transpose(0, 1)
    return patch


class RandomBatches(torch.utils.data.Sampler):
    """Sec. 3.2: "16 random 96x96 HR sub images of distinct training images", for each update.

    usable: indices of the images to draw from. augment: "none", "flip" (mirror images) or "all"
    (eight flips and rotations). The batch of an update depends only on (seed, rank, update), so
    that a run can be resumed. If there are fewer images than patches, images repeat.
    """

    def __init__(self, usable, batch_size, augment, seed, rank, first, last):
        self.usable = usable
        self.batch_size = batch_size
        self.symmetries = SYMMETRIES[augment]
        self.seed = seed
        self.rank = rank
        self.updates = range(first, last)

    def __len__(self):
        return len(self.updates)

    def __iter__(self):
        n = self.batch_size
        for update in self.updates:
            rng = np.random.default_rng((self.seed, self.rank, update))
            image = rng.choice(self.usable, n, replace=n > len(self.usable))
            place = rng.random((n, 2))
            symmetry = rng.choice(self.symmetries, n)
            yield list(zip(image, place, symmetry))


def collate(items):
    """Items of Patches -> ([uint8 [n, w, w, 3] of HR and, if given, of LR], messages)."""
    messages = []
    complete = []
    for windows, complaints in items:
        messages.extend(complaints)
        if windows is not None:
            complete.append(windows)
    if len(complete) < len(items):
        return None, messages
    return [torch.stack(windows) for windows in zip(*complete)], messages


def batches(patches, sampler, device):
    """Yield LR [n, 3, p/scale, p/scale] in [0, 1] and HR [n, 3, p, p] in [-1, 1] on the device.

    p is the patch size. Worker processes decode images that are not stored. Raises InputError if
    images or shared memory run out.
    """
    stored = patches.hr.pixels is not None
    loader = torch.utils.data.DataLoader(
        patches, batch_sampler=sampler, collate_fn=collate, worker_init_fn=leave_signals_to_parent,
        num_workers=0 if stored else count_workers(), pin_memory=device.type == "cuda")
    said = set()
    try:
        for windows, messages in loader:
            for message in messages:
                if message not in said:                          # once for each image
                    say(message)
                    said.add(message)
            if windows is None:
                raise InputError("most of the training images cannot be used")
            yield to_pair(patches, windows, device)
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise InputError("too little shared memory to decode images in other processes; use "
                         "--set store=always or enlarge /dev/shm") from None


def count_workers():
    """One worker for each CPU that this process may use, shared among torchrun's processes."""
    cpus = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def leave_signals_to_parent(worker):
    """A signal to all processes must not end a worker while the training still needs it."""
    for number in (signal.SIGINT, *STOP_SIGNALS):
        signal.signal(number, signal.SIG_IGN)


def to_pair(patches, windows, device):
    """Windows of HR, or of HR and LR, as tensors without their margin: see batches."""
    hr = to_tensor(windows[0].to(device, non_blocking=True))     # [n, 3, w, w]
    if patches.lr is None:
        lr = downsample(hr, patches.scale, patches.kernel)
    else:
        lr = to_tensor(windows[1].to(device, non_blocking=True))
    lr = F.pad(lr, [-patches.margin] * 4)                        # cut the margin off
    hr = F.pad(hr, [-patches.margin * patches.scale] * 4) * 2 - 1
    return (lr.contiguous(memory_format=torch.channels_last),
            hr.contiguous(memory_format=torch.channels_last))


# ==================================================================================================
# 5. Metrics. Sec. 3.1: PSNR and SSIM "on the y-channel", without "a 4-pixel wide strip from each
#    border"; here on 8-bit values, in float64. LPIPS is later work and takes RGB.
# ==================================================================================================

ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


def planes(sr, hr, shave, luma):
    """What is compared of two images: two float64 tensors [1 or 3, H - 2 shave, W - 2 shave]."""
    for image in (sr, hr):
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
            raise ValueError("expected two uint8 arrays [H, W, 3]")
    if sr.shape != hr.shape:
        raise ValueError(f"images of different sizes: {sr.shape} and {hr.shape}")
    h, w, _ = hr.shape
    if min(h, w) <= 2 * shave:
        raise InputError(f"{h}x{w}: nothing is left inside a border of {shave} pixels")
    found = []
    for image in (sr, hr):
        x = torch.from_numpy(image.copy()).movedim(-1, 0)        # [3, H, W]
        x = x[:, shave:h - shave, shave:w - shave].double()
        if luma:                                                 # Y of BT.601, in [16, 235]
            r, g, b = x.split(1)
            x = 16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255
        found.append(x)
    return found


def psnr(sr, hr, shave=4, luma=True):
    """Peak signal-to-noise ratio in dB, 10 log10(255^2 / MSE), of two uint8 arrays [H, W, 3].

    shave: pixels removed from each border. luma: on Y of BT.601 instead of RGB. Identical images
    have no finite PSNR; they get 100 dB, the largest value, so that a mean over images exists.
    Raises ValueError if the sizes differ or nothing remains.
    """
    x, y = planes(sr, hr, shave, luma)
    mse = (x - y).square().mean()
    value = 10 * torch.log10(255 ** 2 / mse)                     # inf for identical images
    return value.clamp(max=100).item()


def ssim(sr, hr, shave=4, luma=True):
    """Structural similarity of Wang et al. 2004, in [-1, 1]. Arguments and errors as for psnr.

    11x11 Gaussian window of sigma 1.5, only inside the image; K1 = 0.01, K2 = 0.03, L = 255.
    """
    x, y = planes(sr, hr, shave, luma)
    if min(x.shape[1:]) < 11:
        raise InputError("SSIM needs 11x11 pixels inside the border")
    window = gaussian(11, 1.5)

    def mean(x):                                                 # weighted by the window
        return weighted_sums(weighted_sums(x, window, 1), window, 2)

    mu_x = mean(x)
    mu_y = mean(y)
    var_x = mean(x * x) - mu_x ** 2
    var_y = mean(y * y) - mu_y ** 2
    covariance = mean(x * y) - mu_x * mu_y
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    above = (2 * mu_x * mu_y + c1) * (2 * covariance + c2)
    below = (mu_x ** 2 + mu_y ** 2 + c1) * (var_x + var_y + c2)
    return (above / below).mean().item()


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
    x = to_tensor(sr)[None].to(device) * 2 - 1                   # [1, 3, H, W] in [-1, 1]
    y = to_tensor(hr)[None].to(device) * 2 - 1
    return network(x, y).item()


# A metric is one row here: tables, files, logs and best checkpoints take it from there.
Metric = namedtuple("Metric", "function title digits higher_is_better")
METRICS = {
    "psnr": Metric(psnr, "PSNR (dB)", digits=2, higher_is_better=True),
    "ssim": Metric(ssim, "SSIM", digits=4, higher_is_better=True),
    "lpips": Metric(lpips, "LPIPS", digits=4, higher_is_better=False),
}


def usable_metrics(with_lpips=True, device="cpu"):
    """Names of METRICS, LPIPS only if it is wanted and available; if it is not, a line says so."""
    names = list(METRICS)
    if with_lpips:
        try:
            load_lpips().to(device)
            return names
        except InputError as error:
            say(f"{error}; going on without it")
    names.remove("lpips")
    return names


def measure(sr, hr, names=tuple(METRICS), shave=4, luma=True):
    """Compare two uint8 arrays [H, W, 3]: {name: value} of METRICS, None if not in `names`."""
    scores = dict.fromkeys(METRICS)
    for name in names:
        scores[name] = METRICS[name].function(sr, hr, shave, luma)
    return scores


def measure_all(pairs, models, scale, kernel, save=None, **protocol):
    """Measure models on the images of find_pairs: {stem: {model: result of measure}}.

    models: {name: function of LR, uint8 [h, w, 3], and of the image's stem, which returns SR}.
    protocol: names, shave and luma, as for measure. save: called as save(stem, {model: SR}, HR,
    {model: result of measure}) after each image. An image that cannot be measured is left out for
    all models, and a line says why; so is one of a single colour, on which PSNR means nothing.
    """
    results = {}
    for stem, hr_path, lr_path in tqdm(pairs, unit="image", leave=False, disable=None):
        try:
            lr, hr = open_pair(hr_path, lr_path, scale, kernel)
            if (hr == hr[0, 0]).all():
                raise InputError("all pixels have one colour, so that PSNR means nothing; left out")
            # Every model's SR comes before the first metric: if one fails, none is measured.
            images = {}
            for model, function in models.items():
                images[model] = function(lr, stem)
                if images[model].shape != hr.shape:
                    raise InputError(f"the image of {model} is not {hr.shape[1]}x{hr.shape[0]}")
            scores = {}
            for model, sr in images.items():
                scores[model] = measure(sr, hr, **protocol)
            if save:
                save(stem, images, hr, scores)
            results[stem] = scores
        except InputError as error:
            message = str(error)
            if not message.startswith((str(hr_path), str(lr_path))):
                message = f"{stem}: {message}"
            say(message)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            say(f"{stem}: out of memory")
    return results


def aggregate(scores):
    """Results of measure for several images -> {metric: {"mean", "std"}, or None if missing}."""
    summary = dict.fromkeys(METRICS)
    for name in METRICS:
        values = [score[name] for score in scores]
        if None not in values:
            summary[name] = {"mean": float(np.mean(values)), "std": float(np.std(values))}
    return summary


def describe(summary):
    """The means of aggregate as text, such as "PSNR 28.43  SSIM 0.8111"."""
    parts = []
    for name, metric in METRICS.items():
        if summary[name]:
            parts.append(f"{name.upper()} {summary[name]['mean']:.{metric.digits}f}")
    return "  ".join(parts)


def side_by_side(images, labels):
    """uint8 [h, w, 3] arrays of one size, each with its label below it -> PIL.Image."""
    h, w, _ = images[0].shape

    # The largest size of letters, from 24 down to 8, with which every line fits below its image.
    lines = "\n".join(labels).split("\n")
    size = 24
    while size > 8 and max(map(ImageFont.load_default(size).getlength, lines)) > w:
        size -= 1
    most_lines = max(label.count("\n") + 1 for label in labels)
    height = h + (1 + most_lines) * size * 4 // 3

    sheet = Image.new("RGB", (len(images) * (w + 4) - 4, height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, label) in enumerate(zip(images, labels)):
        left = i * (w + 4)                                       # 4 white pixels between images
        sheet.paste(Image.fromarray(image), (left, 0))
        draw.text((left + w / 2, (h + height) / 2), label, fill="black", font_size=size,
                  anchor="mm", align="center")
    return sheet


# ==================================================================================================
# 6. Upscaling. An SR pixel depends only on the LR pixels within the network's radius. So tiles that
#    overlap by this radius, cropped to their own area, give exactly the untiled result. The layers
#    at LR size see far and take little memory; those after them see 3 LR pixels and take much. So
#    the former process large tiles, and the latter enlarge each tile in small parts.
# ==================================================================================================

TILE = 1448                              # LR pixels per side: 2 megapixels take 2 GB
PART = 64                                # LR pixels per side that are enlarged together


# The slices of a tile, and what it sees: itself and the overlap.
Area = namedtuple("Area", "rows columns seen_rows seen_columns")


def radii(generator):
    """How far an SR pixel sees, in LR pixels: (through all of G, through what follows the skip)."""
    before = radius(generator.head, generator.blocks, generator.fuse)
    enlarging = radius(generator.upsample, generator.tail)
    return before + enlarging, enlarging


def radius(*networks):
    """How far a pixel behind these networks sees, in pixels of their input, rounded up."""
    pixels = 0
    size = 1                                                     # of a pixel, halved by a shuffle
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                far = module.dilation[0] * (module.kernel_size[0] // 2)    # k x k sees k // 2
                pixels += far * size
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


def cut_tiles(height, width, side, overlap):
    """Cut an area into even tiles of at most side x side: a list of `Area`."""
    areas = []
    for rows, seen_rows in spans(height, side, overlap):
        for columns, seen_columns in spans(width, side, overlap):
            areas.append(Area(rows, columns, seen_rows, seen_columns))
    return areas


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
    maps = compute_maps(generator, lr)                           # [1, 64, h, w]
    for part in cut_tiles(height, width, PART, radii(generator)[1]):
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

    tile: side of the tiles, in LR pixels; None for TILE (half of it at scale 8), 0 for one tile. It
    bounds the memory and does not change the result. ensemble: average over the eight flips and
    rotations. precision: "fp32" or "bf16". progress: show a progress bar. Raises TypeError for
    anything but uint8 [h, w, 3], and MemoryError if there is not enough memory.
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
    areas = cut_tiles(height, width, side, radii(generator)[0])

    # The progress bar counts the parts of all tiles, eight times for an ensemble.
    parts = 0
    for area in areas:
        seen = image[area.seen_rows, area.seen_columns]
        parts += len(cut_tiles(len(seen), len(seen[0]), PART, overlap=0))
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
# 7. Checkpoints, other files, and how a script starts. A checkpoint is a dictionary of tensors,
#    numbers and strings. "generator": the result of training, the moving average of G's weights;
#    "arch": G's arguments; and what train.py adds.
# ==================================================================================================

VGG19_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def float_state(network):
    """Parameters and batch-norm statistics, as a list of tensors."""
    return [tensor for tensor in network.state_dict().values() if tensor.is_floating_point()]


@torch.no_grad()
def ema_(average, current, decay):
    """Exponential moving average: average = decay * average + (1 - decay) * current, in place.

    Both are lists of tensors, from float_state.
    """
    torch._foreach_lerp_(average, current, 1 - decay)


def temporary_path(path):
    """A hidden path beside `path`, whose name depends only on `path`."""
    path = Path(os.path.realpath(path))                          # a link stays one
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    return path.with_name(f".{name}{path.suffix}")


@contextlib.contextmanager
def replacing(path):
    """A temporary path beside `path`: renamed to `path` on success, deleted on failure.

    The next run replaces what a killed one left behind. Raises InputError if `path` is a folder
    or a device.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is not a file; choose another name")
    temporary = temporary_path(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())                              # or a power cut leaves it empty
        os.replace(temporary, os.path.realpath(path))
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
        with replacing(path) as temporary:
            torch.save({"generator": generator.state_dict(), "arch": generator.arch, **more},
                       temporary)
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


def load_generator(path, device="cpu"):
    """The generator of a checkpoint of train.py: float32, in eval mode. Raises InputError."""
    state = load_checkpoint(path)
    try:
        with torch.device("meta"):                               # takes no memory
            generator = make_generator(**state["arch"])
        weights = state["generator"]
        for name, tensor in weights.items():
            if tensor.is_meta or tensor.is_complex() or tensor.layout != torch.strided:
                raise ValueError(f"{name} does not hold plain numbers")
        generator.load_state_dict(weights, assign=True)
    except Exception as error:                                   # a file may hold anything
        raise InputError(f"{path}: holds no generator that train.py wrote "
                         f"({type(error).__name__}: {one_line(error)})") from None
    return generator.float().to(device, memory_format=torch.channels_last).eval()


def make_generator(block="residual", scale=4, channels=64, n_blocks=16, tanh=False):
    """The generator that GENERATORS lists for `block`, with these arguments. Raises InputError."""
    if type(scale) is not int or scale not in SCALES:
        raise InputError(f"scale {scale!r:.20} is not 2, 4 or 8")
    if n_blocks > 256 or channels > 1024:
        raise InputError(f"{n_blocks!r:.20} blocks of {channels!r:.20} feature maps are too many")
    return GENERATORS[block](scale, channels, n_blocks, tanh)


def load_features(network, weights, url):
    """Load weights into a content network in place (see TruncatedVGG19). Raises InputError."""
    if weights == "random":
        rng = torch.Generator().manual_seed(0)
        for p in network.parameters():
            if p.dim() > 1:
                nn.init.kaiming_normal_(p, generator=rng)
            else:
                nn.init.zeros_(p)
        return
    if weights == "imagenet":
        state = download_features(url)
    else:
        state = load_checkpoint(weights)
    try:
        needed = {}
        for key in network.state_dict():                         # a file may begin with features.
            needed[key] = state[key] if key in state else state[f"features.{key}"]
        network.load_state_dict(needed)
    except (KeyError, RuntimeError) as error:                    # missing, or of another shape
        raise InputError(f"{weights}: no weights of this network ({one_line(error)})") from None


def download_features(url):
    """The state dict behind a URL of torchvision, kept in torch's cache. Raises InputError."""
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True,
                                                  weights_only=True)
    except Exception as error:                                   # offline, cut off, wrong hash
        raise InputError(f"cannot download {url} ({one_line(error)}); download it elsewhere "
                         "and pass --feature-weights FILE, or --feature-weights random to try "
                         "things out") from None


def handle_signals(numbers, handler):
    """Call handler(number, frame) for these signals, but not for those that are ignored (nohup)."""
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def exit_with_signal(number, frame):
    sys.exit(128 + number)


def run(main):
    """Call a script's main() and exit with its status; an InputError is one line and status 2."""
    handle_signals(STOP_SIGNALS, exit_with_signal)
    handle_signals([signal.SIGINT], signal.default_int_handler)
    warnings.filterwarnings("ignore", module="PIL")              # about odd files
    sys.stdout.reconfigure(errors="backslashreplace")            # odd file names
    sys.stderr.reconfigure(errors="backslashreplace")
    PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 25                      # bytes; also for ICC profiles
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
# 8. Beyond the paper: G's initialisation, and what other presets select, each with its source. A
#    new loss, network or norm is one function or class, one row in its table, and one setting.
# ==================================================================================================

class DenseBlock(nn.Module):
    """Wang et al. 2018, Fig. 4: five k3 convolutions, each of which sees all earlier maps."""

    def __init__(self, n, growth=32):
        super().__init__()
        self.convs = nn.ModuleList()
        for i in range(4):
            self.convs.append(nn.Conv2d(n + i * growth, growth, 3, padding=1))
        self.convs.append(nn.Conv2d(n + 4 * growth, n, 3, padding=1))

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

    def __init__(self, scale=4, channels=64, n_blocks=16, tanh=False):
        super().__init__(scale, channels, 0, tanh)
        self.arch["n_blocks"] = n_blocks
        for _ in range(n_blocks):
            self.blocks.append(RRDB(channels))
        self.fuse = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1))


class VariantDiscriminator(Discriminator):
    """Fig. 4's D by default; other projects' with other arguments. Shapes as for Discriminator.

    channels: feature maps of each convolution, whose strides alternate between 1 and 2.
    first_kernel: size of the first kernel. norm: a key of NORMS. pool: average the features to
    pool x pool positions, so that D fits any patch size; 0: do not.
    """

    def __init__(self, patch_size=96, channels=(64, 64, 128, 128, 256, 256, 512, 512),
                 first_kernel=3, norm="batch", pool=0):
        nn.Module.__init__(self)
        self.features = nn.Sequential(
            nn.Conv2d(3, channels[0], first_kernel, padding=first_kernel // 2), nn.LeakyReLU(0.2))
        side = patch_size
        stride = 2
        for n_in, n in zip(channels, channels[1:]):
            self.features.append(discriminator_block(n_in, n, stride, NORMS[norm]))
            side = math.ceil(side / stride)
            stride = 3 - stride                                  # 2, 1, 2, 1 ...
        if pool:
            self.features.append(nn.AdaptiveAvgPool2d(pool))
            side = pool
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(channels[-1] * side * side, 1024),
            nn.LeakyReLU(0.2), nn.Linear(1024, 1))


@torch.no_grad()
def start_as_nearest(generator):
    """Start G as nearest-neighbour upsampling: it learns faster and shows no checkerboard.

    Three channels carry RGB from end to end. The four filters that PixelShuffle interleaves into
    one map start with equal weights (ICNR, Aitken et al. 2017, arXiv:1707.02937). LR's x becomes
    2 x - 1, or, with a Tanh, tanh(2.5 x - 1.25), which is near it and stays within 0.85 of 0.
    """
    # The first three maps are R, G and B.
    nn.init.dirac_(generator.head[0].weight[:3])
    generator.head[0].bias[:3] = 0

    # The last layer of the residual branch starts at zero, so that only the skip connection acts.
    for p in generator.fuse[-1].parameters():
        nn.init.zeros_(p)

    # Each map m becomes the four maps 4m to 4m + 3, with equal weights; the first three stay RGB.
    for conv in generator.upsample[::3]:
        rgb = slice(0, 12, 4)
        nn.init.dirac_(conv.weight[rgb])
        conv.bias[rgb] = 0
        for p in (conv.weight, conv.bias):
            p.copy_(p[::4].repeat_interleave(4, dim=0))

    # From [0, 1] to the range of HR.
    gain = 2.5 if generator.arch["tanh"] else 2
    nn.init.dirac_(generator.tail.weight).mul_(gain)
    generator.tail.bias.fill_(-gain / 2)


def start_at_random(generator):
    """Keep torch's random initialisation."""


GENERATORS = {"residual": Generator, "rrdb": RRDBGenerator}
INITS = {"nearest": start_as_nearest, "torch": start_at_random}
NORMS = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}


class TruncatedSqueezeNet(ContentNetwork):
    """SqueezeNet 1.1 up to features[layer]: 1/60 of the work of VGG19. See TruncatedVGG19.

    layer "12" is the last: [N, 3, 96, 96] -> [N, 512, 5, 5].
    """
    layers = tuple(map(str, range(13)))

    def __init__(self, layer="12", weights="imagenet", divisor=12.75):
        from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1
        features = squeezenet1_1().features[:int(layer) + 1]
        load_features(features, weights, SqueezeNet1_1_Weights.IMAGENET1K_V1.url)
        super().__init__(features, divisor)


CONTENT_NETWORKS = {"vgg19": TruncatedVGG19, "squeezenet1_1": TruncatedSqueezeNet}


def total_variation(sr, hr):
    """Sec. 3.4: SRResNet-VGG22 adds it to VGG22, with weight 2e-8. [N, 3, H, W] -> scalar.

    The paper gives neither norm nor scale. Here, the absolute differences between neighbouring
    pixels are summed over each image and averaged over the batch. For photos, 2e-8 times this sum
    is about half a per cent of the content loss; 2e-8 times a mean over pixels would be nothing.
    HR plays no part; it is there because all content losses are called alike.
    """
    down = sr.diff(dim=2).abs().sum()
    right = sr.diff(dim=3).abs().sum()
    return (down + right) / len(sr)


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
    return (fourier_amplitudes(hr, window) - fourier_amplitudes(sr, window)).abs().mean()


def fourier_amplitudes(x, window):
    """Of windows that overlap by half: [N, 3, H, W] -> [N, 3, rows, columns, window, window/2+1]"""
    r, g, b = x.float().unbind(1)
    grey = (r + g + b) / 3 ** 0.5
    red_blue = (r - b) / 2 ** 0.5
    green_purple = (r - 2 * g + b) / 6 ** 0.5
    x = torch.stack([grey, red_blue, green_purple], 1)           # orthonormal
    hann = torch.hann_window(window, periodic=False, device=x.device)
    hann = hann / hann.square().mean().sqrt()
    x = x.unfold(2, window, window // 2).unfold(3, window, window // 2)
    return torch.fft.rfft2(x * hann * hann[:, None], norm="ortho").abs()


PIXEL_LOSSES = {"mse": mse_loss, "l1": F.l1_loss}


def content_losses(pixel_loss="mse", phi=None, scale=4):
    """{name: function of SR and HR}: the terms that l_X of Eq. 3 can consist of.

    The setting <name>_weight weighs each. A new term is a row here and a setting in config.json.
    """
    return {
        "pixel": PIXEL_LOSSES[pixel_loss],                       # Eq. 4, or L1
        "content": functools.partial(content_loss, phi),         # Eq. 5
        "tv": total_variation,                                   # Sec. 3.4
        "grid": functools.partial(grid_loss, scale=scale),
        "fourier": fourier_loss,
    }


CONTENT_LOSSES = tuple(content_losses())                         # their names


class WeightedSum:
    """A weighted sum of functions of SR and HR. `parts` keeps the latest value of each, by name."""

    def __init__(self):
        self.terms = {}                                          # name: (weight, function)
        self.parts = {}

    def __call__(self, sr, hr):
        total = 0
        for name, (weight, function) in self.terms.items():
            self.parts[name] = function(sr, hr)
            total = total + weight * self.parts[name]
        return total


def wasserstein_g_loss(D, sr):
    """G's side of Gulrajani et al. 2017, Eq. 2. D is a critic: it returns scores. -> scalar"""
    return -D(sr).mean()


def wasserstein_d_loss(real, fake):
    """The critic's loss of Gulrajani et al. 2017, Eq. 3, but for its penalty. Scores -> scalar"""
    return fake.mean() - real.mean()


def relativistic_g_loss(D, sr, hr):
    """G's loss of the relativistic average GAN (Jolicoeur-Martineau 2018), Wang et al. 2018, Eq. 2:
    SR should look more real than the average HR, and HR less real than the average SR. -> scalar"""
    fake = D(sr)
    real = D(hr)
    return discriminator_loss(fake - real.mean(), real - fake.mean())


def relativistic_d_loss(real, fake):
    """D's loss, Wang et al. 2018, Eq. 1: HR should look more real than the average SR, and SR less
    real than the average HR. Logits [N] -> scalar"""
    return discriminator_loss(real - fake.mean(), fake - real.mean())


Game = namedtuple("Game", "g_loss d_loss g_sees_hr")             # see srgan_step
ADVERSARIAL_LOSSES = {
    "bce": Game(adversarial_loss, discriminator_loss, g_sees_hr=False),      # Eq. 6 and 2
    "wasserstein": Game(wasserstein_g_loss, wasserstein_d_loss, g_sees_hr=False),
    "relativistic": Game(relativistic_g_loss, relativistic_d_loss, g_sees_hr=True),
}


def input_gradient(D, x):
    """The gradient of each image's score: [N, 3, H, W] -> [N, 3 H W]."""
    x = x.detach().requires_grad_()
    gradient, = torch.autograd.grad(D(x).sum(), x, create_graph=True)
    return gradient.flatten(1)


def gradient_penalty(D, sr, hr):
    """Gulrajani et al. 2017, arXiv:1704.00028, Eq. 3: the mean of (|grad D(x)| - 1)^2 at random
    points x between SR and HR. -> scalar"""
    mix = torch.rand(len(hr), 1, 1, 1, dtype=hr.dtype, device=hr.device)
    norm = input_gradient(D, torch.lerp(hr, sr, mix)).norm(dim=1)
    return (norm - 1).square().mean()


def r1_penalty(D, sr, hr):
    """Mescheder et al. 2018, arXiv:1801.04406, Eq. 9, for gamma = 1: mean of |grad D(HR)|^2 / 2.
    -> scalar"""
    return input_gradient(D, hr).square().sum(1).mean() / 2


PENALTIES = {"gradient_penalty": gradient_penalty, "r1_penalty": r1_penalty}  # settings: weights


# ==================================================================================================
# 9. Speed: the same mathematics, computed faster. `Fast` is for training, optimize_for_inference
#    for upscaling. At the end: the choice of device and precision, and a demonstration.
# ==================================================================================================

class Fast(nn.Module):
    """A network as training calls it: in its fast form and the given precision, float32 in and out.

    It exchanges the network's activations and, in bf16, the weights of phi. The parameters stay the
    network's own; save and load the network itself.
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
                return enlarge(self.network, compute_maps(self.network, x))
            return self.network(x).float()


def compute_maps(generator, lr):
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

    A pixel behind the shuffle, at one of r^2 positions within a pixel of x, sees fixed positions
    within the pixels of x around it. So k x k weights for c maps, shifted by the position and
    unshuffled, become weights for c r^2 maps: 9x9 from 64 to 3 maps turns into 5x5 from 256 to 12
    maps, after which 3 large maps are shuffled instead of 64.
    """
    k = conv.kernel_size[0]
    p = conv.padding[0]
    reach = math.ceil(p / r)                                     # in pixels of x
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
        self.weight = weight                                     # that of the PReLU it replaces

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

    BN is folded into the convolutions, PReLU becomes LeakyReLU, which can overwrite its input, and
    the tail is rearranged. The copy's forward() is fast, too, and so is what is exported from it.
    """
    generator = copy.deepcopy(generator).eval().requires_grad_(False)
    generator.to(memory_format=torch.channels_last)              # as oneDNN and cuDNN prefer it
    generator.head = fold(generator.head)
    generator.fuse = fold(generator.fuse)
    for block in generator.blocks:
        if isinstance(block, ResidualBlock):
            block.body = fold(block.body)

    # The last shuffle moves behind the tail.
    *layers, shuffle, activation = fold(generator.upsample)
    generator.upsample = nn.Sequential(*layers, activation)
    weight, bias, padding = rearranged(generator.tail)
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=padding)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.bias = nn.Parameter(bias, requires_grad=False)
    generator.tail = nn.Sequential(conv, shuffle)
    return generator


def fold(layers):
    """The same layers with BN folded into the convolutions, and PReLU as LeakyReLU."""
    folded = nn.Sequential()
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d):
            folded[-1] = nn.utils.fuse_conv_bn_eval(folded[-1], layer)
        elif isinstance(layer, nn.PReLU):
            slope = layer.weight.item()
            in_place = slope >= 0                                # else torch cannot differentiate
            folded.append(nn.LeakyReLU(slope, in_place))
        else:
            folded.append(layer)
    return folded


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

    try:
        faster = time_convolution(device, torch.bfloat16) < time_convolution(device, torch.float32)
    except RuntimeError:                                         # no bf16
        return "fp32"
    return "bf16" if faster else "fp32"


@torch.inference_mode()
def time_convolution(device, dtype):
    """How many seconds a small convolution takes in this dtype: the shortest of eight times."""
    x = torch.zeros(4, 64, 64, 64).to(device, dtype, memory_format=torch.channels_last)
    conv = nn.Conv2d(64, 64, 3, padding=1).to(device, dtype, memory_format=torch.channels_last)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        conv(x)[0, 0, 0, 0].item()                               # waits for the device
        times.append(time.perf_counter() - began)
    return min(times)


def demonstrate():
    """Build both networks and take one step of each stage on random patches, on the CPU."""
    torch.manual_seed(0)
    G = Generator()
    D = Discriminator()
    phi = TruncatedVGG19("2_2", weights="random")                 # nothing is downloaded
    adam_G = torch.optim.Adam(G.parameters(), lr=1e-4)
    adam_D = torch.optim.Adam(D.parameters(), lr=1e-4)
    lr = torch.rand(2, 3, 24, 24)                                 # LR in [0, 1]
    hr = torch.rand(2, 3, 96, 96) * 2 - 1                         # HR in [-1, 1]
    print(f"G: {count_parameters(G):,} parameters, {list(lr.shape)} -> {list(G(lr).shape)}")
    print(f"D: {count_parameters(D):,} parameters, {list(hr.shape)} -> {list(D(hr).shape)}")

    losses = srresnet_step(G, adam_G, mse_loss, lr, hr)
    print("a step of SRResNet: " + describe_losses(losses))

    # D's loss is near 2 log 2, as D has learnt nothing yet. G's adversarial loss is large, because
    # it is computed by the D that has just learnt from this very batch.
    vgg_loss = functools.partial(content_loss, phi)
    losses = srgan_step(G, D, adam_G, adam_D, vgg_loss, lr, hr)
    print("a step of SRGAN: " + describe_losses(losses))


def count_parameters(network):
    return sum(p.numel() for p in network.parameters())


def describe_losses(losses):
    return ", ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items())


if __name__ == "__main__":
    demonstrate()
