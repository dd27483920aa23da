"""Section 5, PSNR, SSIM and LPIPS, and what is reported of them."""
import numpy as np
import pytest
import torch
from conftest import photo

import srgan


def pair(h=64, w=80):
    """SR and HR, an image and a worse version of it."""
    hr = photo(h, w, seed=1)
    noise = np.random.default_rng(2).normal(0, 12, hr.shape)
    return np.clip(hr * 0.9 + noise + 5, 0, 255).astype(np.uint8), hr


def test_psnr_and_ssim_are_the_figures_that_scikit_image_gave():
    y, x = np.mgrid[0:48, 0:64]
    hr = np.stack([3 * x + 2 * y, 5 * y, x * y], 2).astype(np.uint8)
    sr = np.stack([3 * x + 2 * y + x % 7, 5 * y + y % 5, x * y + 9], 2).astype(np.uint8)
    assert srgan.psnr(sr, hr) == pytest.approx(32.785205, abs=1e-4)
    assert srgan.ssim(sr, hr) == pytest.approx(0.879417, abs=1e-4)


def test_simple_cases_come_out_as_by_hand():
    black, white = np.zeros((20, 20, 3), np.uint8), np.full((20, 20, 3), 255, np.uint8)
    assert srgan.psnr(black, white, luma=False) == pytest.approx(0)
    assert srgan.psnr(black, white) == pytest.approx(20 * np.log10(255 / 219))  # Y: 16 to 235
    assert srgan.psnr(black, black) == np.inf and srgan.ssim(black, black) == pytest.approx(1)


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


@pytest.mark.parametrize("metric, side, h, words", [
    (srgan.psnr, 63, 64, "two sizes"), (srgan.psnr, 8, 8, "nothing is left"),
    (srgan.ssim, 16, 16, "11x11"), (srgan.lpips, 31, 31, "32x32")])
def test_sizes_that_differ_or_vanish_are_refused(metric, side, h, words):
    sr, hr = pair()
    with pytest.raises(ValueError, match=words):
        metric(sr[:side], hr[:h])
    with pytest.raises(ValueError, match="uint8"):
        srgan.psnr(sr / 255, hr / 255)


def test_lpips_sees_whole_rgb_images_in_the_range_its_network_expects(monkeypatch):
    """LPIPS takes [-1, 1]: against a network that compares what it is given."""
    network, (sr, hr) = torch.nn.PairwiseDistance(), pair()
    network.weight = torch.nn.Parameter(torch.zeros(1))
    network.forward = lambda x, y: (x - y).square().mean() + x.max()
    monkeypatch.setattr(srgan, "load_lpips", lambda: network)
    expected = ((sr / 127.5 - hr / 127.5) ** 2).mean() + sr.max() / 127.5 - 1
    for shave, on_y in ((0, False), (4, True)):                  # neither changes it
        assert srgan.lpips(sr, hr, shave, on_y) == pytest.approx(expected, rel=1e-5)


def test_a_metric_that_is_missing_is_none_and_infinity_has_no_deviation():
    sr, hr = pair()
    scores = [srgan.measure(sr, hr, ["psnr"]), srgan.measure(hr, hr, ["psnr"])]
    assert scores[0] == {"psnr": srgan.psnr(sr, hr), "ssim": None, "lpips": None}
    total = srgan.aggregate(scores)
    assert total["ssim"] is None and total["psnr"]["mean"] == np.inf
    assert np.isnan(total["psnr"]["std"])
    total = srgan.aggregate([{"psnr": x, "ssim": x, "lpips": x} for x in (1.0, 2.0, 6.0)])
    assert total["ssim"] == pytest.approx({"mean": 3, "std": (14 / 3) ** 0.5})
