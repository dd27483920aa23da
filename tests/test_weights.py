"""The bundled weights do what the README says of them, on the pictures of figures/HR."""
import json
import os
import re

import numpy as np
import pytest
import torch
from conftest import ROOT

import srgan

MODELS = ("srresnet", "srgan")


@pytest.fixture(scope="module")
def results():
    """{model: [(SR, HR)]}"""
    pictures = [srgan.open_pair(hr, lr, 4, "bicubic") for _, hr, lr in srgan.find_pairs(ROOT / "figures/HR")]
    found = {"bicubic": [(srgan.bicubic(lr, 4), hr) for lr, hr in pictures]}
    for model in MODELS:
        generator = srgan.optimize_for_inference(srgan.load_generator(ROOT / f"weights/{model}.pth"))
        found[model] = [(srgan.upscale(generator, lr), hr) for lr, hr in pictures]
    return found


def mean(results, model, function):
    return np.mean([float(function(sr, hr)) for sr, hr in results[model]])


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_small_and_say_how_they_were_made(model):
    path = ROOT / f"weights/{model}.pth"
    state = torch.load(path, weights_only=True)
    assert os.path.getsize(path) < 7e6 and all(t.dtype == torch.float16 for t in state["generator"].values() if t.is_floating_point())
    assert state["arch"] == srgan.Generator().arch and state["step"] > 1000 and state["preset"] and state["data"] and state["date"] and state["code"]
    assert not any(isinstance(value, str) and value.startswith("/") for value in state.values())  # no path of a machine


def test_srresnet_is_closer_to_the_original_than_bicubic_and_srgan(results):
    psnr = {model: mean(results, model, srgan.psnr) for model in results}
    assert psnr["srresnet"] > psnr["bicubic"] + 1.5 and psnr["srgan"] > psnr["bicubic"] and psnr["srresnet"] > psnr["srgan"]


def test_srgans_texture_is_closer_to_the_original_than_srresnets_and_has_no_grid(results):
    def tensors(function):
        return lambda *pair: function(*(srgan.to_tensor(x)[None] * 2 - 1 for x in pair))
    spectrum, grid = ({model: mean(results, model, tensors(function)) for model in results} for function in (srgan.spectrum_loss, srgan.grid_loss))
    assert spectrum["srgan"] < 0.95 * spectrum["srresnet"] < spectrum["bicubic"]
    assert grid["srgan"] < 1.3 * grid["srresnet"]


@pytest.mark.skipif("SRGAN_TEST_DATA" not in os.environ, reason="needs Set5 and Set14")
@pytest.mark.parametrize("data", ["Set5", "Set14"])
def test_the_readmes_results_are_what_the_weights_give(script, tmp_path, data):
    status, _, err = script("evaluate", "--ckpt", *[ROOT / f"weights/{model}.pth" for model in MODELS], "--no-lpips",
                            "--data", os.path.join(os.environ["SRGAN_TEST_DATA"], data), "--json", tmp_path / "result.json")
    assert status == 0, err
    found = json.loads((tmp_path / "result.json").read_text())["models"]
    column = {"Set5": 2, "Set14": 3}[data]
    rows = re.findall(r"^\| (?:`weights/\w+.pth`|bicubic) \| \d+\.\d+ / .*", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert len(rows) == 3
    for row in rows:
        name, cell = row.split("|")[1].strip(" `"), row.split("|")[column].strip()
        model = found[name if name == "bicubic" else str(ROOT / name)]
        for text, metric, tolerance in zip(cell.split(" / "), ("psnr", "ssim"), (0.011, 0.00011)):
            assert float(text) == pytest.approx(model[metric]["mean"], abs=tolerance), row
