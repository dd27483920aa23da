import json
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
    """SR and HR, an image and a worse version of it."""
    hr = photo(h, w, seed=1)
    noise = np.random.default_rng(2).normal(0, 12, hr.shape)
    return np.clip(hr * 0.9 + noise + 5, 0, 255).astype(np.uint8), hr


def luma(x):
    return 16 + (x.astype(np.float64) @ np.array([65.481, 128.553, 24.966])) / 255


def test_psnr_and_ssim_agree_with_scikit_image():
    theirs = pytest.importorskip("skimage.metrics")
    wang = dict(data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    for h, w, shave in ((64, 80, 4), (41, 57, 0), (50, 33, 7)):
        sr, hr = pair(h, w)
        for on_y in (True, False):
            a, b = ((luma(x) if on_y else x)[shave:h - shave, shave:w - shave] for x in (sr, hr))
            psnr = theirs.peak_signal_noise_ratio(b, a, data_range=255)
            ssim = theirs.structural_similarity(b, a, channel_axis=None if on_y else 2, **wang)
            assert srgan.psnr(sr, hr, shave, on_y) == pytest.approx(psnr, abs=1e-4)
            assert srgan.ssim(sr, hr, shave, on_y) == pytest.approx(ssim, abs=1e-4)


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


def test_sizes_that_differ_or_vanish_are_refused():
    sr, hr = pair()
    for f, args, words in ((srgan.psnr, (sr[:-1], hr), "two sizes"),
                           (srgan.psnr, (sr[:8], hr[:8]), "nothing is left"),
                           (srgan.ssim, (sr[:16], hr[:16]), "11x11"),
                           (srgan.psnr, (sr / 255, hr / 255), "uint8")):
        with pytest.raises(ValueError, match=words):
            f(*args)


def test_lpips_sees_whole_rgb_images_in_the_range_its_network_expects(monkeypatch):
    """LPIPS takes [-1, 1]: against a network that reports what it is given."""
    class Reports(torch.nn.Module):
        def forward(self, x, y):
            seen[:] = x, y
            return (x - y).square().mean()
    network, seen, (sr, hr) = Reports(), [], pair()
    network.weight = torch.nn.Parameter(torch.zeros(1))
    monkeypatch.setattr(srgan, "load_lpips", lambda: network)
    for shave, on_y in ((0, False), (4, True)):                      # neither changes it
        value = srgan.lpips(sr, hr, shave, on_y)
        assert value == pytest.approx(((sr / 127.5 - hr / 127.5) ** 2).mean())
        for x, image in zip(seen, (sr, hr)):
            expected = torch.from_numpy(image / 127.5 - 1).permute(2, 0, 1)[None]
            torch.testing.assert_close(x, expected.float(), atol=1e-6, rtol=0)
    with pytest.raises(srgan.InputError, match="32x32"):
        srgan.lpips(sr[:31], hr[:31])


def test_a_metric_that_is_missing_is_none_and_infinity_has_no_deviation():
    sr, hr = pair()
    scores = [srgan.measure(sr, hr, ["psnr"]), srgan.measure(hr, hr, ["psnr"])]
    assert scores[0] == {"psnr": srgan.psnr(sr, hr), "ssim": None, "lpips": None}
    total = srgan.aggregate(scores)
    assert total["ssim"] is None and total["psnr"]["mean"] == np.inf
    assert np.isnan(total["psnr"]["std"])
    total = srgan.aggregate([{"psnr": x, "ssim": x, "lpips": x} for x in (1.0, 2.0, 6.0)])
    assert total["ssim"] == pytest.approx({"mean": 3, "std": (14 / 3) ** 0.5})


def test_json_is_valid_whatever_was_measured(tmp_path):
    document = {"a": {"b": np.inf, "c": 1.5}, "d": [float("nan"), -np.inf], "e": "größe"}
    srgan.write_json(tmp_path / "r.json", document)

    def refuse(constant):
        raise ValueError(constant)
    found = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert found == {"a": {"b": None, "c": 1.5}, "d": [None, None], "e": "größe"}


@pytest.mark.skipif("SRGAN_TEST_DATA" not in os.environ, reason="needs Set5 and Set14")
@pytest.mark.parametrize("name, psnr, ssim", [("Set5", 28.43, 0.8111), ("Set14", 26.09, 0.7048)])
@pytest.mark.parametrize("given", [True, False])
def test_bicubic_gives_the_figures_of_the_field(name, psnr, ssim, given):
    folder = Path(os.environ["SRGAN_TEST_DATA"]) / name
    scores = []
    for _, hr, lr in srgan.find_pairs(folder if given else folder / "HR"):
        lr, hr = srgan.open_pair(hr, lr)
        scores.append(srgan.measure(srgan.upsample(lr), hr, ["psnr", "ssim"]))
    mean = srgan.aggregate(scores)
    assert mean["psnr"]["mean"] == pytest.approx(psnr, abs=0.006 if given else 0.02)
    assert mean["ssim"]["mean"] == pytest.approx(ssim, abs=6e-5 if given else 3e-4)


@pytest.mark.parametrize("option", ["--feature-weights", "--vgg-weights"])
def test_realism_is_0_for_the_original_and_grows_with_blur(script, tmp_path, option):
    """tests/realism.py, with random features in place of SqueezeNet's."""
    distances = []
    for radius in (0, 1, 3):
        for folder, blur in (("hr", 0), ("sr", radius)):
            (tmp_path / folder).mkdir(exist_ok=True)
            for i in range(2):
                image = Image.fromarray(photo(80, 96, i)).filter(ImageFilter.GaussianBlur(blur))
                image.save(tmp_path / folder / f"{i}.png")
        status, out, err = script("realism", "sr", "hr", option, "random")
        assert status == 0, err
        distances.append([float(re.search(rf"{name} distance ([\d.]+)", out)[1])
                          for name in ("perceptual", "texture")])
    assert distances[0] == [0, 0]
    assert all(a < b < c for a, b, c in zip(*distances))
