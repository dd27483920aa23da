import functools
import hashlib
import http.server
import importlib
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import srgan

ROOT = Path(__file__).parents[1]
OLD = ROOT / "tests" / "old"
TINY = ("--set", "channels=8", "--set", "n_blocks=1", "--set", "patch_size=32",
        "--batch-size", "4", "--set", "lpips=false", "--set", "content_network=vgg19:2_2",
        "--set", "content_weights=random")


def photo(h, w, seed=0):
    """An image with structure of every size, as photos have: uint8 [h, w, 3]."""
    rng, total = np.random.default_rng(seed), 0
    for level in range(6):
        small = rng.standard_normal((2 + (h >> level), 2 + (w >> level), 3)) * 20 * 1.4 ** level
        layer = [Image.fromarray(small[:, :, c].astype(np.float32))
                 .resize((w, h), Image.Resampling.BICUBIC) for c in range(3)]
        total = total + np.stack(layer, 2)
    return np.clip(total + 128, 0, 255).astype(np.uint8)


def same(a, b):
    """Whether nested dictionaries and lists of tensors are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder of six PNG images of different sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(6):
        Image.fromarray(photo(100 + 3 * i, 130 - 5 * i, i)).save(folder / f"p{i}.png")
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """No test finds or leaves weights in the user's cache, and none waits for a proxy."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))
    monkeypatch.setenv("no_proxy", "*")
    srgan.load_lpips.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def two_threads():
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def generator():
    """A small generator in eval mode: random weights, batch norms that have seen something."""
    g = srgan.Generator(channels=8, n_blocks=3)
    for p in g.parameters():
        torch.nn.init.normal_(p, std=0.15) if p.dim() > 1 else torch.nn.init.uniform_(p, 0.1, 0.5)
    for _ in range(3):
        g.train()(torch.rand(4, 3, 24, 24))
    return g.eval()


@pytest.fixture
def script(monkeypatch, capsys, tmp_path):
    """script("train", "--data", ...) runs a script in tmp_path: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, *srgan.STOP_SIGNALS)}

    def call(name, *args):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            srgan.run(module.main)
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err
    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def one_line():
    """Asserts that a message is one line without a traceback."""
    def check(text):
        assert len(text.strip().splitlines()) == 1 and "Traceback" not in text, text
    return check


@pytest.fixture
def offer(tmp_path):
    """offer(name, content) serves a file on 127.0.0.1: its address, and four that fail."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def copyfile(self, source, target):                      # "cut-": the connection breaks off
            content = source.read()
            target.write(content[:len(content) // 2] if "cut-" in self.path else content)
    handler = functools.partial(Quiet, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def serve(name, content):
        good = f"{name}-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        wrong = f"{name}-01234567.pth"                           # not its hash
        for file in (good, wrong, f"cut-{good}"):
            (folder / file).write_bytes(content)
        url = f"http://127.0.0.1:{server.server_port}"
        return f"{url}/{good}", [f"{url}/{wrong}", f"{url}/cut-{good}", f"{url}/no-{wrong}",
                                 f"http://127.0.0.1:9/{wrong}"]
    yield serve
    server.shutdown()
