import importlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]


def photo(h, w, seed=0):
    """A picture with structure at every size, as photos have: uint8 [h, w, 3]."""
    rng, total = np.random.default_rng(seed), 0
    for level in range(6):
        small = rng.standard_normal((2 + (h >> level), 2 + (w >> level), 3)) * 20 * 1.4 ** level
        layer = [Image.fromarray(small[:, :, c].astype(np.float32)).resize((w, h), Image.Resampling.BICUBIC) for c in range(3)]
        total = total + np.stack(layer, 2)
    return np.clip(total + 128, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of six PNG pictures of different sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(6):
        Image.fromarray(photo(100 + 3 * i, 130 - 5 * i, i)).save(folder / f"p{i}.png")
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """No test finds, or leaves, weights in the user's cache, and none of them waits for a proxy."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(autouse=True, scope="session")
def two_threads():
    torch.set_num_threads(min(2, os.cpu_count()))


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """script("train", "--data", ...) runs a script in tmp_path: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(name, *args):
        module, srgan = importlib.import_module(name), importlib.import_module("srgan")
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            srgan.run(module.main)
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def same(a, b):
    """Nested dictionaries and lists of tensors that are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


TINY = ("--set", "channels=8", "--set", "n_blocks=1", "--set", "patch_size=32", "--batch-size", "4", "--set", "lpips=false",
        "--set", "content_network=vgg19:2_2", "--set", "content_weights=random")


@pytest.fixture
def one_line():
    """Asserts that a message is one line without a traceback."""
    def check(text):
        assert len(text.strip().splitlines()) == 1 and "Traceback" not in text, text
    return check
