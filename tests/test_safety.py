"""Attacks from outside: killed runs, full disks, hostile states, broken images, closed streams.

faults.py has the long forms of some.
"""
import contextlib
import copy
import fcntl
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
import torch
from conftest import LAUGHS, ROOT, SMALL, photo, same
from PIL import Image

import srgan


@pytest.fixture
def data(photos):
    return ("--data", photos, "--val", photos / "p0.png", *SMALL,
            "--set", "discriminator.channels=[4,4,8,8]")


def half_written(folder):
    return [path for path in folder.rglob(".*") if path.suffix != ".lock"]


# Killed runs and full disks

class Killed(BaseException):
    pass


def test_a_run_that_is_killed_at_any_of_its_writes_ends_as_one_that_was_not(
        script, data, tmp_path, monkeypatch):
    """Each time a file is to take its place the run ends, and leaves what it has written."""
    def run(out, *more, kill_at=None):
        calls = []

        def replace(*paths, real=os.replace):
            calls.append(paths)
            if len(calls) == kill_at:
                raise Killed
            real(*paths)
        with monkeypatch.context() as context:
            context.setattr(os, "replace", replace)
            if kill_at:
                context.setattr(Path, "unlink", lambda *_, **__: None)
            with contextlib.suppress(Killed):
                assert script("train", *data, "--stage", "srresnet", "--epochs", 2, "--lr", 1e-3,
                              "--steps-per-epoch", 1, "--cache", out / "cache", "--out", out,
                              *more)[0] == 0
        return len(calls)
    n_writes, latest = run(tmp_path / "whole"), "checkpoint_latest.pth"
    whole = srgan.load_checkpoint(tmp_path / "whole" / latest)
    for number in range(1, n_writes + 1):
        out = tmp_path / f"killed-{number}"
        assert run(out, kill_at=number) == number and half_written(out)
        run(out, *["--resume"] * (out / latest).exists())
        state = srgan.load_checkpoint(out / latest)
        assert all(same(whole[key], state[key])
                   for key in ("step", "training", "generator", "best"))
        assert (out / "metrics.csv").read_text().count("\n") == 3 and not half_written(out)


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(script, data, tmp_path, full_disk):
    args = (*data, "--stage", "srresnet", "--steps-per-epoch", 2)
    assert script("train", *args, "--epochs", 1)[0] == 0
    latest = tmp_path / "runs/srresnet/checkpoint_latest.pth"
    before = latest.read_bytes()
    with full_disk(len(before) // 2):
        status, _, err = script("train", *args, "--epochs", 2, "--resume")
    assert status == 2 and err.count("train.py: ") == 1 and "Traceback" not in err, err
    assert latest.read_bytes() == before and not half_written(tmp_path)
    assert script("train", *args, "--epochs", 2, "--resume")[0] == 0


def test_sigterm_in_the_middle_of_a_folder_leaves_whole_images_only(start, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(300):
        Image.new("RGB", (40, 40), (i % 256, 7, 9)).save(tmp_path / "in" / f"{i}.png")
    process = subprocess.Popen([sys.executable, ROOT / "upscale.py", "in", "out", "--ckpt", start],
                               cwd=tmp_path, stderr=subprocess.DEVNULL)
    while len(results := [*tmp_path.glob("out/[0-9]*.png")]) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=60) == 143 and not half_written(tmp_path)
    assert all(Image.open(path).size == (160, 160) for path in results)


def test_nothing_is_open_or_mapped_while_it_is_replaced_nor_synced_that_was_opened_to_read(
        script, data, tmp_path, monkeypatch, start):
    """The rules of Windows, where os.replace and os.fsync fail otherwise; in all three scripts."""
    replaced, synced, real_replace, real_fsync = [], [], os.replace, os.fsync

    def replace(source, target):
        used = {os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()}
        used |= {line.split(maxsplit=5)[5].strip() for line in open("/proc/self/maps")
                 if "/" in line}
        assert used.isdisjoint({os.path.realpath(source), os.path.realpath(target)})
        replaced.append(Path(target).name)
        real_replace(source, target)

    def fsync(file):
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        synced.append(flags & os.O_ACCMODE != os.O_RDONLY)
        real_fsync(file)
    monkeypatch.setattr(os, "replace", replace), monkeypatch.setattr(os, "fsync", fsync)
    for args in (("srresnet", "--epochs", 1), ("gan", "--epochs", 1, "--init", start),
                 ("gan", "--epochs", 2, "--resume")):
        status, _, err = script("train", *data, "--stage", *args, "--steps-per-epoch", 1)
        assert status == 0, err
        for path in tmp_path.glob("cache/*.pixels"):
            os.truncate(path, 100)                               # so it is made again
    image = data[3]
    assert script("evaluate", "--ckpt", start, "--data", image, "--no-lpips", "--json", "m.json",
                  "--csv", "m.csv", "--save-images", "sheets")[0] == 0
    for more in (), ("--overwrite",):
        assert script("upscale", image, "sr.png", "--ckpt", start, *more)[0] == 0
    assert {"metrics.csv", "config.json", "summary.json", "checkpoint_latest.pth", "epoch_0001.png",
            "m.json", "m.csv", "sr.png"} <= {*replaced}
    assert sum(name.endswith(".pixels") for name in replaced) == 3 and synced and all(synced)


# Hostile states

def put(*path):
    """state -> None: sets the last of `path` at the place in the state that the others lead to."""
    *path, key, value = path

    def change(state):
        for part in path:
            state = state[part]
        state[key] = value(state[key]) if callable(value) else value
    return change


MOMENTS = "training", "discriminator_adam", 0
HOSTILE = [
    put("step", "x"), put("step", -1), put("step", 10 ** 30), put("stage", ["gan"]),
    put("config", {3: 4}), put("config", {"channels": 10 ** 9}), put("seconds", "x"),
    put("best", {"psnr": {"mean": torch.ones(2), "std": 0, "epoch": 1}}),
    put("best", {"psnr": {"mean": 1.0, "std": 0.0, "epoch": float("inf")}}),
    put("generator", 3), lambda state: state["generator"].pop("tail.bias"), put("training", [1]),
    put("training", "sums", "loss", "x"), put("training", "sums", LAUGHS),
    put("training", "generator", "fuse.1.running_var", torch.full((8,), torch.inf)),
    put("training", "generator_adam", {}), put("training", "generator_adam", 99, {}),
    put(*MOMENTS, "exp_avg", torch.zeros(64, 64, 9, 9)), put(*MOMENTS, "exp_avg", lambda m: m[:1]),
    put(*MOMENTS, "exp_avg", lambda m: torch.zeros(()).expand(m.shape)),
    put(*MOMENTS, "exp_avg", lambda m: m.tolist()), put(*MOMENTS, "step", torch.ones(5)),
]


def test_hostile_states_are_refused_when_resumed(script, data, tmp_path, start, one_line):
    """An optimiser's moments of another size would crash the process, or write beyond them."""
    args = (*data, "--stage", "gan", "--steps-per-epoch", 2)
    assert script("train", *args, "--epochs", 1, "--init", start, "--out", "good")[0] == 0
    good, latest = srgan.load_checkpoint("good/checkpoint_latest.pth"), tmp_path / "x.pth"
    for number, change in enumerate(HOSTILE):
        state = copy.deepcopy(good)
        change(state)
        torch.save(state, latest)
        status, _, err = script("train", *args, "--epochs", 2, "--resume", latest, "--out", "out")
        assert status == 2 and len(err) < 400 and not (tmp_path / "out").exists(), (number, err)
        one_line(err)
    torch.save(good, latest)
    assert script("train", *args, "--epochs", 2, "--resume", latest, "--out", "out")[0] == 0


# Broken images, closed streams

@pytest.mark.filterwarnings("ignore")                            # Pillow's, of odd files
def test_broken_images_are_opened_or_named_in_one_line(tmp_path):
    rng, good = random.Random(0), 0
    for i in range(100):
        path = tmp_path / f"{i}.{('png', 'jpg', 'webp', 'tif', 'gif')[i % 5]}"
        Image.fromarray(photo(40, 56)).save(path)
        path.write_bytes(faults.mutate(path.read_bytes(), rng, path.suffix[1:]))
        if srgan.count_pixels(path) > 10 ** 6:                   # it claims to be large
            continue
        try:
            srgan.open_image(path).load()
            good += 1
        except srgan.InputError as error:
            assert path.name in str(error) and "\n" not in str(error)
    assert 10 < good < 80


def test_closed_streams_are_no_fault(script, data, start, tmp_path, monkeypatch):
    """As cron may start it, or with a reader that is gone."""
    command = [sys.executable, ROOT / "upscale.py", data[3], "b.png", "--ckpt", start]
    subprocess.run(["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *command], cwd=tmp_path, check=True)
    assert (tmp_path / "b.png").exists()
    monkeypatch.setattr(sys, "stdout", None), monkeypatch.setattr(sys, "stderr", None)
    assert script("train", *data, "--stage", "srresnet", "--epochs", 1,
                  "--steps-per-epoch", 1)[0] == 0
    assert srgan.load_checkpoint(tmp_path / "runs/srresnet/checkpoint_latest.pth")["step"] == 1
    evaluate = ("evaluate", "--data", data[3], "--no-lpips", "--csv", "r.csv")
    assert script(*evaluate)[0] == 0 and (tmp_path / "r.csv").stat().st_size
    os.unlink(tmp_path / "r.csv")
    read, write_end = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdout", open(write_end, "w"))     # as in | head -0
    script(*evaluate)
    assert (tmp_path / "r.csv").stat().st_size
