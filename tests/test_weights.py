"""The bundled weights do what the README says of them, on the images in figures/HR."""
import json
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import srgan

MODELS = ("srresnet", "srgan")


@pytest.fixture(scope="session")
def results():
    """{model: [(SR, HR)]}"""
    images = [srgan.open_pair(hr) for hr in srgan.find_images(ROOT / "figures/HR")]
    found = {"bicubic": [(srgan.interpolate(lr), hr) for lr, hr in images]}
    for model in MODELS:
        generator = srgan.load_generator(ROOT / f"weights/{model}.pth")
        found[model] = [(srgan.upscale(generator, lr), hr) for lr, hr in images]
    return found


def mean(results, model, function):
    return np.mean([float(function(sr, hr)) for sr, hr in results[model]])


def detail(image):
    """Grey image less its 5x5 mean: [1, 1, H, W]."""
    x = srgan.to_tensor(image).mean(0)[None, None] * 255
    return x - F.avg_pool2d(x, 5, 1, 2, count_include_pad=False)


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_small_and_say_how_they_were_made(model):
    path = ROOT / f"weights/{model}.pth"
    state = torch.load(path, weights_only=True)
    assert os.path.getsize(path) < 7e6 and state["step"] > 1000
    assert all(t.dtype == torch.float16 for t in state["generator"].values()
               if t.is_floating_point())
    assert srgan.load_generator(path).arch == srgan.Generator(tanh=True).arch
    assert not any(isinstance(value, str) and value.startswith("/") for value in state.values())
    assert state["preset"] and state["data"] and state["date"] and state["code"]


def test_srresnet_has_the_best_psnr_and_srgan_the_strongest_texture(results):
    psnr = {model: mean(results, model, srgan.psnr) for model in results}
    assert psnr["bicubic"] - 0.5 < psnr["srgan"] < psnr["srresnet"] > psnr["bicubic"] + 1
    texture = {model: mean(results, model, lambda sr, hr: detail(sr).std() / detail(hr).std())
               for model in results}
    assert texture["bicubic"] < texture["srresnet"] < texture["srgan"]
    assert 0.8 < texture["srgan"] < 1.1                          # 1 in the originals


def test_srgan_shows_no_grid(results):
    """The mean over many LR pixels keeps a grid and cancels texture."""
    def grid(sr, hr):
        error = F.pixel_unshuffle(detail(sr) - detail(hr), 4)    # [1, 16, h, w]
        return F.avg_pool2d(error, 8).abs().mean()
    assert mean(results, "srgan", grid) < 1.3 * mean(results, "srresnet", grid)


@pytest.fixture
def all_cores():
    """The benchmarks' images, unlike the other tests', are worth them."""
    before = torch.get_num_threads()
    torch.set_num_threads(srgan.count_workers())
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif("SRGAN_TEST_DATA" not in os.environ, reason="needs Set5 and Set14")
@pytest.mark.parametrize("data", ["Set5", "Set14", "BSD100"])
def test_the_readmes_results_are_what_the_weights_give(script, tmp_path, all_cores, data):
    status, _, err = script("evaluate", "--no-lpips", "--json", tmp_path / "result.json", "--data",
                            os.path.join(os.environ["SRGAN_TEST_DATA"], data), "--ckpt",
                            *[ROOT / f"weights/{model}.pth" for model in MODELS])
    assert status == 0, err
    found = json.loads((tmp_path / "result.json").read_text())["models"]
    table = re.search(r"\| *\| *Set5 *\| *Set14 *\| *BSD100 *\|\n(?:\|.*\n)+",
                      (ROOT / "README.md").read_text("utf-8"))[0]
    rows = {row.split("|")[1].strip(" `*"): row.split("|")[2:] for row in table.splitlines()}
    for name, model in found.items():
        cell = rows[name.removeprefix(f"{ROOT}/")][["Set5", "Set14", "BSD100"].index(data)]
        psnr, ssim = map(float, cell.split("/"))
        assert psnr == pytest.approx(model["psnr"]["mean"], abs=0.011), name
        assert ssim == pytest.approx(model["ssim"]["mean"], abs=0.00011), name
