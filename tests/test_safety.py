"""Killed and interrupted scripts, power cuts, and what Windows forbids."""
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL, same

import srgan


@pytest.fixture
def train(script, photos):
    """train("gan", ...) runs train.py, one update an epoch: (exit status, stderr)."""
    def call(stage, *args):
        return script("train", "--data", photos, "--val", photos / "p0.png", *SMALL,
                      "--set", "discriminator.channels=[4,4,8,8]", "--set", "steps_per_epoch=1",
                      "--stage", stage, *args)[::2]
    return call


class Killed(BaseException):
    """What no script catches."""


def test_a_run_killed_at_any_of_its_writes_ends_like_one_that_was_not(train, monkeypatch):
    """train.py, with srgan.replacing."""
    real = os.replace
    n_writes = 0

    def run(out, kill_at=None):
        nonlocal n_writes
        n_writes = 0

        def replace(source, target):
            nonlocal n_writes
            n_writes += 1
            if n_writes == kill_at:
                raise Killed
            real(source, target)
        monkeypatch.setattr(os, "replace", replace)
        resume = ["--resume"] if (out / "checkpoint_latest.pth").exists() else []
        status, err = train("srresnet", "--epochs", 2, "--set", "srresnet.lr=1e-3", "--out", out,
                            "--cache", out / "cache", *resume)
        assert status == 0, err

    run(Path("whole"))
    whole = srgan.load_checkpoint("whole/checkpoint_latest.pth")
    for number in range(1, n_writes + 1):
        out = Path(f"killed-{number}")
        with pytest.raises(Killed):
            run(out, kill_at=number)
        run(out)
        state = srgan.load_checkpoint(out / "checkpoint_latest.pth")
        assert same(whole["generator"], state["generator"]), number
        assert same(whole["training"], state["training"]), number
        assert (out / "metrics.csv").read_text().count("\n") == 3


def test_a_file_is_whole_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """srgan.replacing: otherwise, a power cut may leave an empty file under the final name."""
    path, events, real = tmp_path / "a.json", [], os.replace

    def sync(number):
        content = os.pread(number, 100, 0)
        events.append(content)

    def replace(source, target):
        events.append(Path(target).name)
        real(source, target)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    srgan.write_json(path, [1])
    assert events == [b"[\n  1\n]\n", "a.json"] and path.read_bytes() == events[0]


def test_what_a_killed_process_left_behind_is_replaced(tmp_path):
    """srgan.replacing and srgan.temporary_path."""
    path = tmp_path / "a.json"
    srgan.temporary_path(path).write_text("half of a fi")
    srgan.write_json(path, {})
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["folder", "/dev/null"])
def test_a_folder_or_a_device_is_never_replaced(tmp_path, name):
    """srgan.replacing: as root, a renamed file would take the place of a device."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(srgan.InputError, match=f"{name} is not a file"):
        srgan.write_json(tmp_path / name, {})
    assert not (tmp_path / name).is_file()


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_between_images_leaves_only_whole_ones(script, photos, start, monkeypatch, number,
                                                        status):
    """upscale.py and srgan.run."""
    done, compute = [], srgan.upscale

    def upscale(*args, **options):
        if len(done) == 3:
            signal.raise_signal(number)
        done.append(compute(*args, **options))
        return done[-1]
    monkeypatch.setattr(srgan, "upscale", upscale)
    assert script("upscale", photos, "out", "--ckpt", start)[0] == status
    assert not [*Path().rglob(".*")]                             # neither temporary files nor locks
    for path, pixels in zip(srgan.find_images("out"), done, strict=True):
        assert np.array_equal(srgan.open_rgb(path), pixels)


def open_files():
    """The paths of all files that this process has open or mapped into memory."""
    paths = {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
    for line in Path("/proc/self/maps").read_text().splitlines():
        paths.add(line.split(maxsplit=5)[-1])
    return paths


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_no_file_is_replaced_while_it_is_open_which_windows_forbids(script, train, photos, start,
                                                                    monkeypatch):
    """All three scripts."""
    replaced, real = [], os.replace

    def replace(source, target):
        assert open_files().isdisjoint([os.path.realpath(source), os.path.realpath(target)])
        replaced.append(Path(target).name)
        real(source, target)
    monkeypatch.setattr(os, "replace", replace)
    image = photos / "p0.png"
    for args in (("srresnet", "--epochs", 1), ("gan", "--epochs", 1, "--init", start),
                 ("gan", "--epochs", 2, "--resume")):
        assert train(*args)[0] == 0
    assert script("evaluate", "--ckpt", start, "--data", image, "--no-lpips", "--json", "m.json",
                  "--csv", "m.csv", "--save-images", "sheets")[0] == 0
    for options in ([], ["--overwrite"]):
        assert script("upscale", image, "sr.png", "--ckpt", start, *options)[0] == 0
    for name in ("metrics.csv", "config.json", "checkpoint_latest.pth", "m.json", "m.csv",
                 "sr.png"):
        assert name in replaced
