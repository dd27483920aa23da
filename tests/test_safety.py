"""Killed runs, hostile states, closed streams, the rules of Windows. See also faults.py."""
import contextlib
import copy
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LAUGHS, ROOT, SMALL, same

import srgan


@pytest.fixture
def train(script, photos):
    """train("gan", ...) runs train.py, one update an epoch: (exit status, stderr)."""
    def call(stage, *args):
        return script("train", "--data", photos, "--val", photos / "p0.png", *SMALL,
                      "--set", "discriminator.channels=[4,4,8,8]", "--steps-per-epoch", 1,
                      "--stage", stage, *args)[::2]
    return call


def half_written(folder):
    return [path for path in folder.rglob(".*") if path.suffix != ".lock"]


# Killed runs

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
        assert run(out, kill_at=number) == number and half_written(out)
        run(out, *["--resume"] * (out / latest).exists())
        state = srgan.load_checkpoint(out / latest)
        assert all(same(whole[key], state[key])
                   for key in ("step", "training", "generator", "best"))
        assert (out / "metrics.csv").read_text().count("\n") == 3 and not half_written(out)


def test_sigterm_in_the_middle_of_a_folder_leaves_only_whole_images(script, photos, start,
                                                                    monkeypatch):
    sizes, compute = [], srgan.upscale

    def upscale(generator, image, **options):
        sizes.append(image.shape)
        if len(sizes) == 4:
            signal.raise_signal(signal.SIGTERM)
        return compute(generator, image, **options)
    monkeypatch.setattr(srgan, "upscale", upscale)
    assert script("upscale", photos, "out", "--ckpt", start)[0] == 143 and not half_written(Path())
    assert [srgan.open_rgb(path).shape for path in srgan.find_images("out")] == [
        (4 * h, 4 * w, 3) for h, w, _ in sizes[:3]]


@pytest.mark.parametrize("name", ["train", "evaluate", "upscale"])
def test_ctrl_c_while_torch_is_imported_ends_a_script_silently(name):
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
        status, err = train(*args)
        assert status == 0, err
        for path in Path("cache").glob("*.pixels"):
            os.truncate(path, 100)                               # so that it is made again
    image = photos / "p0.png"
    for args in (("evaluate", "--ckpt", start, "--data", image, "--no-lpips", "--json", "m.json",
                  "--csv", "m.csv", "--save-images", "sheets"),
                 ("upscale", image, "sr.png", "--ckpt", start),
                 ("upscale", image, "sr.png", "--ckpt", start, "--overwrite")):
        assert script(*args)[0] == 0
    assert {"metrics.csv", "config.json", "summary.json", "checkpoint_latest.pth", "epoch_0001.png",
            "m.json", "m.csv", "sr.png"} <= {*replaced}
    assert sum(name.endswith(".pixels") for name in replaced) == 3 and synced and all(synced)


# Hostile states

ADAM = "training", "discriminator_adam", 0
HOSTILE = [  # (path to an entry of the checkpoint, its new value or a function of the old one)
    ("step", "x"), ("step", -1), ("step", 10 ** 30), ("stage", ["gan"]), ("config", {3: 4}),
    ("config", {"channels": 10 ** 9}), ("seconds", "x"), ("generator", 3), ("training", [1]),
    ("best", {"psnr": {"mean": torch.ones(2), "std": 0, "epoch": 1}}),
    ("best", {"psnr": {"mean": 1.0, "std": 0.0, "epoch": float("inf")}}),
    ("training", "sums", "loss", "x"), ("training", "sums", LAUGHS),
    ("training", "generator", "fuse.1.running_var", torch.full((8,), torch.inf)),
    ("training", "generator_adam", {}), ("training", "generator_adam", 99, {}),
    (*ADAM, "exp_avg", torch.zeros(64, 64, 9, 9)), (*ADAM, "exp_avg", lambda m: m[:1]),
    (*ADAM, "exp_avg", lambda m: torch.zeros(()).expand(m.shape)),
    (*ADAM, "exp_avg", lambda m: m.tolist()), (*ADAM, "step", torch.ones(5)),
]


def test_a_hostile_state_is_refused_before_it_can_crash_the_optimiser(train, start):
    assert train("gan", "--epochs", 1, "--init", start, "--out", "good")[0] == 0
    good = srgan.load_checkpoint("good/checkpoint_latest.pth")
    for *path, key, value in HOSTILE:
        state = part = copy.deepcopy(good)
        for name in path:
            part = part[name]
        part[key] = value(part[key]) if callable(value) else value
        torch.save(state, "x.pth")
        status, err = train("gan", "--epochs", 2, "--resume", "x.pth", "--out", "out")
        assert status == 2 and len(err) < 400 and not Path("out").exists(), (path, key, err)
    torch.save(good, "x.pth")
    assert train("gan", "--epochs", 2, "--resume", "x.pth", "--out", "out")[0] == 0


# Closed streams

def test_closed_streams_do_no_harm(script, train, photos, start, tmp_path, monkeypatch):
    """As under cron, after `| head`, or on a full disk."""
    command = [sys.executable, ROOT / "upscale.py", photos / "p0.png", "b.png", "--ckpt", start]
    subprocess.run(["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *command], cwd=tmp_path, check=True)
    assert (tmp_path / "b.png").exists()
    monkeypatch.setattr(sys, "stdout", None), monkeypatch.setattr(sys, "stderr", None)
    assert train("srresnet", "--epochs", 1)[0] == 0
    assert srgan.load_checkpoint("runs/srresnet/checkpoint_latest.pth")["step"] == 1
    read, write_end = os.pipe()
    os.close(read)
    for stdout in (None, write_end, "/dev/full"):
        monkeypatch.setattr(sys, "stdout", stdout and open(stdout, "w"))
        script("evaluate", "--data", photos / "p0.png", "--no-lpips", "--csv", "r.csv")
        assert Path("r.csv").stat().st_size
        Path("r.csv").unlink()
