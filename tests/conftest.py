import contextlib
import ctypes
import importlib
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import srgan

ROOT = Path(__file__).parents[1]
TINY = ("--set", "channels=8", "--set", "n_blocks=1", "--set", "patch_size=32",
        "--set", "batch_size=4", "--set", "lpips=false", "--set", "content_network=vgg19:2_2",
        "--set", "content_weights=random")
SMALL = (*TINY, "--set", "content_network=vgg19:1_1", "--set", "discriminator.channels=[8,8,16,16]",
         "--device", "cpu", "--precision", "fp32")


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in a random order")
    parser.addoption("--threads", type=int, default=1, help="of torch (1: tensors are small)")


def pytest_configure(config):
    torch.set_num_threads(config.option.threads)
    signal.signal(signal.SIGINT, signal.default_int_handler)    # ignored under nohup and behind &
    for number in srgan.STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def pytest_report_header(config):
    return f"order: --shuffle {config.option.shuffle}; --threads {config.option.threads}"


def pytest_collection_modifyitems(config, items):
    if config.option.shuffle is not None:
        random.Random(config.option.shuffle).shuffle(items)


def photo(h, w, seed=0):
    """An image with detail of every size, as photos have: uint8 [h, w, 3]."""
    rng = np.random.default_rng(seed)
    total = np.full((h, w, 3), 128.0)
    for level in range(6):
        small = rng.standard_normal((2 + (h >> level), 2 + (w >> level), 3)) * 20 * 1.4 ** level
        for c in range(3):
            layer = Image.fromarray(small[:, :, c].astype(np.float32))
            total[:, :, c] += layer.resize((w, h), Image.Resampling.BICUBIC)
    return np.clip(total, 0, 255).astype(np.uint8)


def randomised(network, std=0.2):
    """The network, with all its parameters drawn anew."""
    for p in network.parameters():
        torch.nn.init.normal_(p, std=std)
    return network


def same(a, b):
    """Whether nested dictionaries and lists of tensors are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def memory(function):
    """The memory that function() takes at its peak, in MB."""
    def status(name):
        return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) / 1024
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")                # reset the peak
    before = status("VmRSS:")
    function()
    return status("VmHWM:") - before


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of six PNG images of different sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(6):
        Image.fromarray(photo(100 + 3 * i, 130 - 5 * i, i)).save(folder / f"p{i}.png")
    return folder


@pytest.fixture(autouse=True)
def reproducible(monkeypatch, tmp_path):
    """A fixed seed, and a torch cache of the test's own."""
    torch.manual_seed(0)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))
    srgan.load_lpips.cache_clear()


@pytest.fixture
def generator():
    """A small generator in eval mode: random weights, batch norms with real statistics."""
    g = srgan.Generator(channels=8, n_blocks=3, tanh=True)
    for p in g.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.15)
        else:
            torch.nn.init.uniform_(p, 0.1, 0.5)
    for _ in range(3):
        g.train()(torch.rand(4, 3, 24, 24))
    return g.eval()


@pytest.fixture
def start(tmp_path):
    """A checkpoint to start from, with random weights: all parameters have a gradient."""
    torch.manual_seed(1)
    generator = srgan.Generator(channels=8, n_blocks=1, tanh=True)
    srgan.save_checkpoint(tmp_path / "start.pth", generator)
    return tmp_path / "start.pth"


def release_locks():
    """What the end of a process does: its run folder may be written to again."""
    if "train" in sys.modules:
        locks = sys.modules["train"].LOCKS
        while locks:
            locks.pop().release()


@contextlib.contextmanager
def kept_signals():
    """Undo what a script changes: what signals do."""
    handlers = {}
    for number in (signal.SIGINT, *srgan.STOP_SIGNALS):
        handlers[number] = signal.getsignal(number)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """script("train", "--data", ...) runs a script in tmp_path: (exit status, stdout, stderr).

    If it did nothing but fail, its message must be one line: the last, which begins with its name.
    Curves are not drawn, which would take longer than the training: see test_train.py.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.draw_curves", lambda rows, path: path.touch())

    def call(name, *args):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        try:
            with pytest.raises(SystemExit) as exit:
                srgan.run(module.main)
        finally:
            release_locks()
        status = exit.value.code or 0
        out, err = capsys.readouterr()
        assert status != 2 or out or err.splitlines()[-1].startswith(f"{name}.py: "), err
        return status, out, err
    with kept_signals():
        yield call


@pytest.fixture
def double(monkeypatch):
    """All that is computed in float32 is in float64: two ways to compute the same agree to 1e-9."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
