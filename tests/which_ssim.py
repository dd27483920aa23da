"""Which SSIM, and which PSNR, is that? A program, not a test:

    pip install scikit-image torchmetrics piq pytorch-msssim kornia pyiqa sewar \
        image-similarity-measures tensorflow-cpu basicsr
    python tests/which_ssim.py

The four images of figures/HR, put together to 640x640, and the bicubic enlargement of their LR go
through the metrics of these libraries, in their default call and in the call that comes closest to
srgan.ssim and srgan.psnr. Each call is made as it is printed. A library that is not installed is
left out with a line.

docs/MEASURED.md shows the table and says why the values differ.
"""
import importlib
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import srgan  # noqa: E402

# What the calls are given: SR and HR as uint8 [H, W, 3] arrays (sr, hr), with BGR colours (bgr_sr,
# bgr_hr), and as tensors [1, 3, H, W] in [0, 1] (rgb_sr, rgb_hr); and the Y channel inside the
# border, as float64 [h, w] in [0, 255] (y_sr, y_hr) and as tensors [1, 1, h, w] in [0, 1] (t_sr,
# t_hr). "module" is the imported module.
CALLS = [  # the package, the module to import, and a call for each line of the table
    ("scikit-image", "skimage.metrics", [
        "structural_similarity(y_hr, y_sr, data_range=255)",
        "structural_similarity(y_hr, y_sr, data_range=255, gaussian_weights=True, sigma=1.5, "
        "use_sample_covariance=False)",
        "peak_signal_noise_ratio(hr, sr)",
        "peak_signal_noise_ratio(y_hr, y_sr, data_range=255)"]),
    ("torchmetrics", "torchmetrics.functional.image", [
        "structural_similarity_index_measure(t_sr, t_hr)",
        "structural_similarity_index_measure(t_sr, t_hr, data_range=1.0)",
        "peak_signal_noise_ratio(t_sr, t_hr, data_range=1.0)"]),
    ("piq", "piq", [
        "ssim(t_sr, t_hr)",
        "ssim(t_sr, t_hr, downsample=False)",
        "psnr(t_sr, t_hr)"]),
    ("pytorch-msssim", "pytorch_msssim", [
        "ssim(255 * t_sr, 255 * t_hr)"]),
    ("kornia", "kornia.metrics", [
        "ssim(t_sr, t_hr, 11).mean()",
        "ssim(t_sr, t_hr, 11, padding='valid').mean()",
        "psnr(t_sr, t_hr, 1.0)"]),
    ("pyiqa", "pyiqa", [
        "create_metric('ssim')(rgb_sr, rgb_hr)",
        "create_metric('ssim', color_space='ycbcr', crop_border=4)(rgb_sr, rgb_hr)",
        "create_metric('psnr')(rgb_sr, rgb_hr)",
        "create_metric('psnry')(rgb_sr, rgb_hr)",
        "create_metric('psnry', color_space='ycbcr', crop_border=4)(rgb_sr, rgb_hr)"]),
    ("sewar", "sewar.full_ref", [
        "ssim(y_hr, y_sr, MAX=255)[0]",
        "ssim(y_hr, y_sr, MAX=255, fltr_specs={'fltr': module.Filter.GAUSSIAN, "
        "'ws': 11, 'sigma': 1.5})[0]",
        "psnr(y_hr, y_sr, MAX=255)"]),
    ("image-similarity-measures", "image_similarity_measures.quality_metrics", [
        "ssim(hr, sr)",
        "ssim(hr, sr, max_p=255)",
        "psnr(hr, sr)",
        "psnr(hr, sr, max_p=255)"]),
    ("tensorflow-cpu", "tensorflow", [
        "image.ssim(y_hr[..., None], y_sr[..., None], 255)",
        "image.psnr(y_hr[..., None], y_sr[..., None], 255)"]),
    ("basicsr", "basicsr.metrics.psnr_ssim", [
        "calculate_ssim(bgr_sr, bgr_hr, crop_border=4)",
        "calculate_ssim(bgr_sr, bgr_hr, crop_border=4, test_y_channel=True)",
        "calculate_psnr(bgr_sr, bgr_hr, crop_border=4)",
        "calculate_psnr(bgr_sr, bgr_hr, crop_border=4, test_y_channel=True)"]),
]


def make_inputs():
    """{name: value} of what the calls are given."""
    images = []
    for path in srgan.find_images(ROOT / "figures/HR"):
        images.append(srgan.open_rgb(path))
    upper = np.hstack(images[:2])
    lower = np.hstack(images[2:])
    hr = np.vstack([upper, lower])                               # [640, 640, 3]
    lr = srgan.downsample(srgan.to_tensor(hr)[None])
    lr = srgan.to_pixels(lr * 2 - 1)[0].numpy()                  # [160, 160, 3]
    sr = srgan.interpolate(lr)

    inputs = {}
    for name, image in (("sr", sr), ("hr", hr)):
        r, g, b = srgan.to_tensor(image).double()
        luma = 16 + 65.481 * r + 128.553 * g + 24.966 * b        # Y of BT.601
        luma = luma[4:-4, 4:-4]
        inputs[name] = image
        inputs[f"bgr_{name}"] = image[..., ::-1].copy()
        inputs[f"rgb_{name}"] = srgan.to_tensor(image)[None]
        inputs[f"y_{name}"] = luma.numpy()
        inputs[f"t_{name}"] = (luma / 255).float()[None, None]
    return inputs


def report(call, value, references):
    """Print a line: the value, its difference from srgan's, and the call."""
    metric = "SSIM" if "structural" in call or "ssim" in call else "PSNR"
    difference = value - references[metric]
    digits = 4 if metric == "SSIM" else 2
    print(f"    {metric} {value:.{digits}f} {difference:+.{digits}f}  {call}", flush=True)


def main():
    warnings.simplefilter("ignore")                              # of libraries about each other

    # The values to compare with, and what usually lies between a number and the protocol.
    inputs = make_inputs()
    sr, hr = inputs["sr"], inputs["hr"]
    references = {"SSIM": srgan.ssim(sr, hr), "PSNR": srgan.psnr(sr, hr)}
    print("this project, srgan")
    report("ssim(sr, hr)", srgan.ssim(sr, hr), references)
    report("ssim(sr, hr, shave=0)", srgan.ssim(sr, hr, shave=0), references)
    report("ssim(sr, hr, luma=False)", srgan.ssim(sr, hr, luma=False), references)
    report("psnr(sr, hr)", srgan.psnr(sr, hr), references)
    report("psnr(sr, hr, shave=0)", srgan.psnr(sr, hr, shave=0), references)
    report("psnr(sr, hr, luma=False)", srgan.psnr(sr, hr, luma=False), references)

    # BasicSR 1.4.2 imports a module that torchvision has renamed.
    renamed = importlib.import_module("torchvision.transforms.functional")
    sys.modules.setdefault("torchvision.transforms.functional_tensor", renamed)

    for package, module_name, calls in CALLS:
        try:
            inputs["module"] = importlib.import_module(module_name)
        except ImportError as error:
            print(f"{package}: not measured ({srgan.one_line(error)})")
            continue
        print(f"{package} {version(package)}, {module_name}")
        for call in calls:
            value = eval(f"module.{call}", inputs)
            report(call, float(torch.as_tensor(value)), references)


if __name__ == "__main__":
    srgan.run(main)
