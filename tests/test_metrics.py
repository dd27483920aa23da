"""Section 5: PSNR, SSIM and LPIPS."""
import numpy as np
import pytest
import torch
from conftest import photo

import srgan


def pair(h=64, w=80):
    """SR and HR: a worse version of an image, and the image."""
    hr = photo(h, w, seed=1)
    noise = np.random.default_rng(2).normal(0, 12, hr.shape)
    return np.clip(hr * 0.9 + noise + 5, 0, 255).astype(np.uint8), hr


def test_psnr_and_ssim_agree_with_scikit_image_and_with_simple_cases_by_hand():
    y, x = np.mgrid[0:48, 0:64]
    hr = np.stack([3 * x + 2 * y, 5 * y, x * y], 2).astype(np.uint8)
    sr = np.stack([3 * x + 2 * y + x % 7, 5 * y + y % 5, x * y + 9], 2).astype(np.uint8)
    assert srgan.psnr(sr, hr) == pytest.approx(32.785205, abs=1e-4)      # scikit-image's
    assert srgan.ssim(sr, hr) == pytest.approx(0.879417, abs=1e-4)
    black, white = np.zeros((20, 20, 3), np.uint8), np.full((20, 20, 3), 255, np.uint8)
    assert srgan.psnr(black, white, luma=False) == pytest.approx(0)
    assert srgan.psnr(black, white) == pytest.approx(20 * np.log10(255 / 219))  # Y: 16 to 235
    assert srgan.psnr(black, black) == np.inf and srgan.ssim(black, black) == pytest.approx(1)
    with pytest.raises(ValueError, match="different sizes"):
        srgan.psnr(black, white[:, :1])                          # torch would broadcast it


@pytest.mark.parametrize("metric, side, h, words", [
    (srgan.psnr, 63, 64, "sizes"), (srgan.psnr, 8, 8, "nothing is left"),
    (srgan.ssim, 16, 16, "11x11"), (srgan.lpips, 31, 31, "32x32")])
def test_sizes_that_differ_or_are_too_small_and_other_types_are_refused(metric, side, h, words):
    sr, hr = pair()
    with pytest.raises(ValueError, match=words):
        metric(sr[:side], hr[:h])
    with pytest.raises(ValueError, match="uint8"):
        srgan.psnr(sr / 255, hr / 255)


@pytest.mark.parametrize("metric", [srgan.psnr, srgan.ssim])
def test_the_border_is_left_out(metric):
    sr, hr = pair()
    spoiled = sr.copy()
    spoiled[:4], spoiled[-4:], spoiled[:, :4], spoiled[:, -4:] = 0, 0, 255, 255
    assert metric(spoiled, hr) == metric(sr, hr)
    assert metric(spoiled, hr, shave=3) < metric(sr, hr, shave=3)


@pytest.mark.parametrize("metric", [srgan.psnr, srgan.ssim])
def test_tensors_give_a_value_for_each_image(metric):
    pairs = [pair(), pair()[::-1], (pair()[0], pair()[0] // 2)]
    sr, hr = (torch.stack([torch.from_numpy(p[i].copy()).movedim(-1, 0) for p in pairs])
              for i in (0, 1))
    expected = [metric(a, b) for a, b in pairs]
    assert metric(sr, hr).tolist() == pytest.approx(expected, abs=1e-9)
    floats = [x.float() / 127.5 - 1 + 1e-3 for x in (sr, hr)]        # off the 8-bit grid
    assert metric(*floats).tolist() == pytest.approx(expected, abs=1e-9)


def test_lpips_takes_whole_rgb_images_in_the_range_its_network_expects(monkeypatch):
    """[-1, 1], shown by a network that compares its inputs."""
    network, (sr, hr) = torch.nn.PairwiseDistance(), pair()
    network.weight = torch.nn.Parameter(torch.zeros(1))
    network.forward = lambda x, y: (x - y).square().mean() + x.max()
    monkeypatch.setattr(srgan, "load_lpips", lambda: network)
    expected = ((sr / 127.5 - hr / 127.5) ** 2).mean() + sr.max() / 127.5 - 1
    assert srgan.lpips(sr, hr, shave=4, luma=True) == pytest.approx(expected, rel=1e-5)
