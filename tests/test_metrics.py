import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image, ImageFilter

import srgan


def pair(h=64, w=80):
    hr = photo(h, w, seed=1)
    noise = np.random.default_rng(2).normal(0, 12, hr.shape)
    return np.clip(hr * 0.9 + noise + 5, 0, 255).astype(np.uint8), hr


def luma(x):
    return 16 + (x.astype(np.float64) @ np.array([65.481, 128.553, 24.966])) / 255


def test_psnr_and_ssim_agree_with_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    for h, w, shave in ((64, 80, 4), (41, 57, 0), (50, 33, 7)):
        sr, hr = pair(h, w)
        a, b = (luma(x)[shave:h - shave, shave:w - shave] for x in (sr, hr))
        assert srgan.psnr(sr, hr, shave) == pytest.approx(metrics.peak_signal_noise_ratio(b, a, data_range=255), abs=1e-4)
        assert srgan.ssim(sr, hr, shave) == pytest.approx(metrics.structural_similarity(
            b, a, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False), abs=1e-4)
        a, b = (x[shave:h - shave, shave:w - shave] for x in (sr, hr))
        assert srgan.psnr(sr, hr, shave, luma=False) == pytest.approx(metrics.peak_signal_noise_ratio(b, a, data_range=255), abs=1e-4)
        assert srgan.ssim(sr, hr, shave, luma=False) == pytest.approx(metrics.structural_similarity(
            b, a, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2), abs=1e-4)


def test_psnr_and_ssim_are_the_figures_that_scikit_image_gave():
    y, x = np.mgrid[0:48, 0:64]
    hr = np.stack([(3 * x + 2 * y) % 256, (5 * y) % 256, (x * y) % 256], 2).astype(np.uint8)
    sr = np.stack([(3 * x + 2 * y + (x % 7)) % 256, (5 * y + (y % 5)) % 256, (x * y + 9) % 256], 2).astype(np.uint8)
    assert srgan.psnr(sr, hr) == pytest.approx(32.785205, abs=1e-4)
    assert srgan.ssim(sr, hr) == pytest.approx(0.879417, abs=1e-4)


def test_simple_cases_come_out_as_by_hand():
    black, white = np.zeros((20, 20, 3), np.uint8), np.full((20, 20, 3), 255, np.uint8)
    assert srgan.psnr(black, white, luma=False) == pytest.approx(0)
    assert srgan.psnr(black, white) == pytest.approx(20 * np.log10(255 / 219))  # Y goes from 16 to 235
    assert srgan.psnr(black, black) == np.inf and srgan.ssim(black, black) == pytest.approx(1)


def test_the_border_is_left_out():
    sr, hr = pair()
    spoiled = sr.copy()
    spoiled[:4], spoiled[-4:], spoiled[:, :4], spoiled[:, -4:] = 0, 0, 255, 255
    assert srgan.psnr(spoiled, hr) == srgan.psnr(sr, hr) and srgan.ssim(spoiled, hr) == srgan.ssim(sr, hr)
    assert srgan.psnr(spoiled, hr, shave=3) < srgan.psnr(sr, hr, shave=3)


def test_tensors_give_a_value_for_each_picture():
    pairs = [pair(), pair()[::-1], (pair()[0], pair()[0] // 2)]
    sr, hr = (torch.stack([torch.from_numpy(p[i].copy()).movedim(-1, 0) for p in pairs]) for i in (0, 1))
    for metric in (srgan.psnr, srgan.ssim):
        expected = [metric(a, b) for a, b in pairs]
        assert metric(sr, hr).tolist() == pytest.approx(expected, abs=1e-9)
        floats = [x.float() / 127.5 - 1 + 1e-3 for x in (sr, hr)]  # in [-1, 1], off the 8-bit grid
        assert metric(*floats).tolist() == pytest.approx(expected, abs=1e-9)


def test_sizes_that_differ_or_vanish_are_refused():
    sr, hr = pair()
    with pytest.raises(ValueError, match="two sizes"):
        srgan.psnr(sr[:-1], hr)
    with pytest.raises(ValueError, match="nothing is left"):
        srgan.psnr(sr[:8], hr[:8])
    with pytest.raises(ValueError, match="11x11"):
        srgan.ssim(sr[:16], hr[:16])
    with pytest.raises(ValueError, match="uint8"):
        srgan.psnr(sr / 255, hr / 255)


@pytest.mark.skipif("SRGAN_TEST_DATA" not in os.environ, reason="SRGAN_TEST_DATA names no folder with Set5 and Set14")
@pytest.mark.parametrize("name, psnr, ssim", [("Set5", 28.43, 0.8111), ("Set14", 26.09, 0.7048)])
@pytest.mark.parametrize("given", [True, False])
def test_bicubic_gives_the_figures_of_the_field(name, psnr, ssim, given):
    folder = Path(os.environ["SRGAN_TEST_DATA"]) / name
    scores = []
    for _, hr, lr in srgan.find_pairs(folder if given else folder / "HR"):
        lr, hr = srgan.open_pair(hr, lr)
        scores.append(srgan.measure(srgan.bicubic(lr), hr))
    mean = srgan.aggregate(scores)
    assert mean["psnr"]["mean"] == pytest.approx(psnr, abs=0.006 if given else 0.02)
    assert mean["ssim"]["mean"] == pytest.approx(ssim, abs=6e-5 if given else 3e-4)


def test_realism_is_0_for_the_original_and_grows_with_blur(script, tmp_path):
    """tests/realism.py, with random features in place of SqueezeNet's."""
    distances = []
    for radius in (0, 1, 3):
        for folder, blur in (("hr", 0), ("sr", radius)):
            (tmp_path / folder).mkdir(exist_ok=True)
            for i in range(2):
                Image.fromarray(photo(80, 96, i)).filter(ImageFilter.GaussianBlur(blur)).save(tmp_path / folder / f"{i}.png")
        status, out, err = script("realism", "sr", "hr", "--vgg-weights", "random")
        assert status == 0, err
        distances.append([float(re.search(rf"{name} distance ([\d.]+)", out)[1]) for name in ("perceptual", "texture")])
    assert distances[0] == [0, 0]
    assert all(a < b < c for a, b, c in zip(*distances))
