"""Attacks from outside: killed runs, full disks, hostile states, broken images, closed streams.

faults.py has the long forms of some.
"""
import contextlib
import copy
import fcntl
import functools
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
import torch
from conftest import ROOT, TINY, photo, same
from PIL import Image

import srgan

SMALL = (*TINY, "--set", "content_network=vgg19:1_1", "--set", "discriminator.channels=[4,4,8,8]",
         "--device", "cpu", "--precision", "fp32")


@pytest.fixture
def data(photos):
    return "--data", photos, "--val", photos / "p0.png", *SMALL


@pytest.fixture
def start(tmp_path):
    srgan.save_checkpoint(tmp_path / "start.pth", srgan.Generator(channels=8, n_blocks=1))
    return tmp_path / "start.pth"


def half_written(folder):
    return [path for path in folder.rglob(".*") if path.suffix != ".lock"]


# Killed runs and full disks

def test_a_run_that_is_killed_and_resumed_ends_as_one_that_was_not(tmp_path):
    assert faults.kill(tmp_path, times=1)["killed"] == 1


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


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(script, data, tmp_path):
    args = (*data, "--stage", "srresnet", "--steps-per-epoch", 2)
    assert script("train", *args, "--epochs", 1)[0] == 0
    latest = tmp_path / "runs/srresnet/checkpoint_latest.pth"
    before, limits = latest.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        status, _, err = script("train", *args, "--epochs", 2, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and err.count("train.py: ") == 1 and "Traceback" not in err, err
    assert latest.read_bytes() == before and not half_written(tmp_path)
    assert script("train", *args, "--epochs", 2, "--resume")[0] == 0


def test_sigterm_in_the_middle_of_a_folder_leaves_whole_images_only(start, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(300):
        Image.fromarray(photo(40, 40)).save(tmp_path / "in" / f"{i}.png")
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
        used |= {line.split(maxsplit=5)[5] for line in open("/proc/self/maps") if "/" in line}
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
    image = data[3]
    assert script("evaluate", "--ckpt", start, "--data", image, "--no-lpips", "--json", "m.json",
                  "--csv", "m.csv", "--save-images", "sheets")[0] == 0
    for more in (), ("--overwrite",):
        assert script("upscale", image, "sr.png", "--ckpt", start, *more)[0] == 0
    assert {"metrics.csv", "config.json", "summary.json", "checkpoint_latest.pth", "epoch_0001.png",
            "m.json", "m.csv", "sr.png"} <= {*replaced}
    assert any(name.endswith(".pixels") for name in replaced) and synced and all(synced)


# Hostile states

def change_moment(make):
    def change(state):
        moments = state["training"]["discriminator_adam"][0]
        moments["exp_avg"] = make(moments["exp_avg"])
    return change


def put(*path):
    *path, key, value = path

    def change(state):
        for part in path:
            state = state[part]
        state[key] = value
    return change


TENSOR = torch.ones(2)
HOSTILE = [
    put("step", "x"), put("step", -1), put("step", TENSOR), put("step", 10 ** 30),
    put("stage", ["gan"]), put("config", {3: 4}), put("config", {"channels": 10 ** 9}),
    put("config", {"gan": {"lr": {"lr": 1}}}), put("seconds", "x"), put("best", 3),
    put("best", {"psnr": 3}), put("best", {"psnr": {"mean": TENSOR, "std": 0, "epoch": 1}}),
    put("best", {"psnr": {"mean": 1.0, "std": 0.0, "epoch": float("inf")}}), put("generator", 3),
    put("training", 3), put("training", {}), put("training", [1]), put("training", "sums", 3),
    put("training", "sums", "loss", "x"), put("training", "sums", functools.reduce(
        lambda nested, _: [nested, nested], range(40), ["ha"])),
    put("training", "generator", "tail.bias", TENSOR),
    put("training", "generator", "fuse.1.running_var", torch.full((8,), torch.inf)),
    lambda state: state["generator"].pop("tail.bias"), put("training", "generator_adam", None),
    put("training", "generator_adam", {}), put("training", "generator_adam", [1, 2]),
    put("training", "generator_adam", 99, {}), change_moment(lambda m: torch.zeros(64, 64, 9, 9)),
    change_moment(lambda m: m[:1].clone()), change_moment(lambda m: m.flatten()),
    change_moment(lambda m: m.long()), change_moment(lambda m: m.double()),
    change_moment(lambda m: m.to("meta")), change_moment(lambda m: m.to_sparse()),
    change_moment(lambda m: torch.zeros(()).expand(m.shape)),
    change_moment(lambda m: m * torch.nan), change_moment(lambda m: m.tolist()),
    put("training", "discriminator_adam", 0, "step", torch.ones(5)),
    put("training", "discriminator_adam", 0, "step", "x"),
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
def test_broken_images_harm_nothing_in_any_script(script, data, start, photos, tmp_path):
    """Each is read or named in one line, whatever the script; the others are done."""
    (tmp_path / "broken").mkdir()
    rng, paths, good = random.Random(0), [], 0
    for i in range(60):
        path = tmp_path / "broken" / f"{i:02d}.{('png', 'jpg', 'webp', 'tif', 'gif')[i % 5]}"
        Image.fromarray(photo(40, 56)).save(path)
        path.write_bytes(faults.mutate(path.read_bytes(), rng, path.suffix[1:]))
        if srgan.count_pixels(path) > 10 ** 6:                   # it claims to be large
            path.unlink()
            continue
        paths.append(path)
        try:
            srgan.open_image(path)
            good += 1
        except srgan.InputError as error:
            assert path.name in str(error) and "\n" not in str(error)
    n_bad = len(paths) - good
    assert good > 5 and n_bad > 20
    status, _, err = script("upscale", "broken", "large", "--ckpt", start)
    results = [path for path in (tmp_path / "large").rglob("*") if path.is_file()]
    assert status == 1 and len(results) == good and err.count(".") >= n_bad
    for path in results:
        Image.open(path).load()
    assert script("evaluate", "--ckpt", start, "--data", "broken", "--no-lpips")[0] == 1
    for path in paths[4:]:
        path.unlink()
    for path in photos.iterdir():
        (tmp_path / "broken" / path.name).write_bytes(path.read_bytes())
    for store in "always", "never":
        status, out, err = script("train", *data[4:], "--data", "broken", "--val", "broken",
                                  "--stage", "srresnet", "--epochs", 1, "--steps-per-epoch", 4,
                                  "--out", store, "--set", f"store={store}")
        assert status == 0 and "left out" in err, err


def test_closed_streams_are_no_fault(script, data, tmp_path, monkeypatch):
    """As cron may start it."""
    monkeypatch.setattr(sys, "stdout", None), monkeypatch.setattr(sys, "stderr", None)
    assert script("train", *data, "--stage", "srresnet", "--epochs", 1,
                  "--steps-per-epoch", 1)[0] == 0
    assert srgan.load_checkpoint(tmp_path / "runs/srresnet/checkpoint_latest.pth")["step"] == 1
