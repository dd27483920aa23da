"""Killed runs, interrupted scripts, the rules of Windows."""
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL, same

import srgan


@pytest.fixture
def train(script, photos):
    """train("gan", ...) runs train.py, one update an epoch: (exit status, stderr)."""
    def call(stage, *args):
        return script("train", "--data", photos, "--val", photos / "p0.png", *SMALL,
                      "--set", "discriminator.channels=[4,4,8,8]", "--steps-per-epoch", 1,
                      "--stage", stage, *args)[::2]
    return call


class Killed(BaseException):
    pass


def test_a_run_killed_at_any_of_its_writes_ends_like_one_that_was_not(train, monkeypatch):
    latest, real = "checkpoint_latest.pth", os.replace

    def run(out, *more, kill_at=None):
        calls = []

        def replace(*paths):
            calls.append(paths)
            if len(calls) == kill_at:                            # what is written stays as it is
                context.setattr(Path, "unlink", lambda *_, **__: None)
                raise Killed
            real(*paths)
        with monkeypatch.context() as context, contextlib.suppress(Killed):
            context.setattr(os, "replace", replace)
            assert train("srresnet", "--epochs", 2, "--lr", 1e-3, "--out", out,
                         "--cache", out / "cache", *more)[0] == 0
        return len(calls)
    n_writes = run(Path("whole"))
    whole = srgan.load_checkpoint(Path("whole", latest))
    for number in range(1, n_writes + 1):
        out = Path(f"killed-{number}")
        assert run(out, kill_at=number) == number and [*out.rglob(".*")]   # a half-written file
        run(out, *["--resume"] * (out / latest).exists())
        state = srgan.load_checkpoint(out / latest)
        assert all(same(whole[key], state[key]) for key in ("generator", "training", "best"))
        assert (out / "metrics.csv").read_text().count("\n") == 3 and not [*out.rglob(".*")]


def test_sigterm_between_images_leaves_only_whole_ones(script, photos, start, monkeypatch):
    done, compute = [], srgan.upscale

    def upscale(*args, **options):
        if len(done) == 3:
            signal.raise_signal(signal.SIGTERM)
        done.append(compute(*args, **options))
        return done[-1]
    monkeypatch.setattr(srgan, "upscale", upscale)
    assert script("upscale", photos, "out", "--ckpt", start)[0] == 143 and not [*Path().rglob(".*")]
    assert all(np.array_equal(srgan.open_rgb(path), pixels)
               for path, pixels in zip(srgan.find_images("out"), done, strict=True))


@pytest.mark.parametrize("name", ["train", "evaluate", "upscale"])
def test_ctrl_c_while_torch_loads_ends_a_script_silently(name):
    process = subprocess.Popen([sys.executable, ROOT / f"{name}.py"], stderr=subprocess.PIPE)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b"" and process.returncode == -signal.SIGINT


def test_no_file_is_replaced_while_open_or_mapped_nor_synced_if_opened_for_reading(
        script, train, photos, monkeypatch, start):
    """Windows allows neither; in all three scripts."""
    replaced, synced, real_replace, real_fsync = [], [], os.replace, os.fsync

    def replace(source, target):
        used = {os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()}
        used |= {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps")
                 if "/" in line}
        assert used.isdisjoint({os.path.realpath(source), os.path.realpath(target)})
        replaced.append(Path(target).name)
        real_replace(source, target)

    def fsync(file):
        synced.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY)
        real_fsync(file)
    monkeypatch.setattr(os, "replace", replace), monkeypatch.setattr(os, "fsync", fsync)
    for args in (("srresnet", "--epochs", 1), ("gan", "--epochs", 1, "--init", start),
                 ("gan", "--epochs", 2, "--resume")):
        assert train(*args)[0] == 0
    image = photos / "p0.png"
    for args in (("evaluate", "--ckpt", start, "--data", image, "--no-lpips", "--json", "m.json",
                  "--csv", "m.csv", "--save-images", "sheets"),
                 ("upscale", image, "sr.png", "--ckpt", start),
                 ("upscale", image, "sr.png", "--ckpt", start, "--overwrite")):
        assert script(*args)[0] == 0
    assert {"metrics.csv", "config.json", "summary.json", "checkpoint_latest.pth", "epoch_0001.png",
            "m.json", "m.csv", "sr.png"} <= {*replaced}
    assert any(name.endswith(".pixels") for name in replaced) and synced and all(synced)


def test_closed_streams_do_no_harm(photos, start, tmp_path):
    """As under cron."""
    command = [sys.executable, ROOT / "upscale.py", photos / "p0.png", "b.png", "--ckpt", start]
    subprocess.run(["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *command], cwd=tmp_path, check=True)
    assert (tmp_path / "b.png").exists()
