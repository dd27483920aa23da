"""Section 7: checkpoints that come back as they were, and files that are none."""
import contextlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import OLD, ROOT, photo, randomised, same

import srgan


class Code:
    """An object whose unpickling calls a function."""

    def __reduce__(self):
        return os.mkdir, ("code-ran",)


def refuse(path, words):
    """The generator in the file is refused with one line that names the file."""
    with pytest.raises(srgan.InputError, match=words) as error:
        srgan.load_generator(path)
    assert path.name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("arch", [{}, {"block": "rrdb"}, {"scale": 2, "tanh": False}])
def test_generators_come_back_as_they_were_and_in_float32(arch, tmp_path):
    g = randomised(srgan.make_generator(**{"channels": 4, "n_blocks": 2, **arch}))
    g(torch.rand(2, 3, 8, 8))
    srgan.save_checkpoint(tmp_path / "g.pth", g.half(), step=3)
    loaded = srgan.load_generator(tmp_path / "g.pth")
    assert not loaded.training and loaded.arch == g.arch and type(loaded) is type(g)
    assert same({**loaded.state_dict()}, {**g.float().state_dict()})
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())
    assert srgan.load_checkpoint(tmp_path / "g.pth")["step"] == 3


@pytest.mark.parametrize("path", sorted(OLD.glob("*.pth")), ids=lambda path: path.stem)
def test_checkpoints_of_older_versions_load(path):
    generator = srgan.load_generator(path)
    assert generator.arch == {"scale": 4, "channels": 4, "n_blocks": 1, "tanh": True,
                              "block": "residual"}
    assert same(torch.load(path, weights_only=True)["generator"], dict(generator.state_dict()))
    assert srgan.upscale(generator, photo(8, 9)).shape == (32, 36, 3)


def test_json_is_valid_whatever_was_measured(tmp_path):
    srgan.write_json(tmp_path / "a.json", {"psnr": [float("inf"), float("nan"), 1.5]})
    assert (tmp_path / "a.json").read_text().split() == [
        "{", '"psnr":', "[", "null,", "null,", "1.5", "]", "}"]


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    content, path = {"generator": {"w": Code()}, "arch": {}}, Path("evil.pth")
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    refuse(path, "not a checkpoint")
    assert not Path("code-ran").exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert Path("code-ran").exists()                             # so the file was a trap


def test_what_is_no_generator_is_refused_in_one_line(generator, tmp_path):
    path = tmp_path / "good.pth"
    srgan.save_checkpoint(path, generator)
    good, whole = torch.load(path), path.read_bytes()
    weights, bias = good["generator"], good["generator"]["tail.bias"]
    for content, words in (
            ({**good, "generator": {**weights, "tail.bias": bias[:2]}}, "tail.bias"),
            ({**good, "generator": {**weights, "more": bias}}, "more"),
            ({**good, "generator": {"tail.bias": bias}}, "head.0.weight"),
            ({**good, "arch": {**good["arch"], "scale": 2}}, "upsample.3"),
            ({**good, "arch": {**good["arch"], "colours": 3}}, "colours"),
            ({**good, "arch": {**good["arch"], "block": "x"}}, "no generator of train.py"),
            ({"state_dict": weights}, "no generator of train.py"),     # of another project
            ([1, 2], "not a checkpoint but a list"), (bias, "not a checkpoint but a Tensor")):
        torch.save(content, path)
        refuse(path, words)
    for content in whole[:9000], b"hello", b"":
        path.write_bytes(content)
        refuse(path, "not a checkpoint")
    refuse(tmp_path / "absent.pth", "no such file"), refuse(tmp_path, "not a checkpoint")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, generator, monkeypatch):
    file, link = tmp_path / "file.txt", tmp_path / "link.txt"
    srgan.write_json(file, "old")
    with pytest.raises(RuntimeError), srgan.replacing(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(srgan.InputError, match="file.txt: cannot be written"):
        monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(OSError("full")))
        srgan.save_checkpoint(file, generator)
    assert file.read_text() == '"old"\n' and list(tmp_path.iterdir()) == [file]
    temporary.write_text("left by a killed process"), link.symlink_to(file)
    srgan.write_json(link, "new")
    assert link.is_symlink() and file.read_text() == '"new"\n' and not temporary.exists()


def test_importing_srgan_changes_nothing_in_the_host_program():
    code = """if True:
        import signal, sys, warnings, PIL.Image, PIL.ImageFont, torch, tqdm, filelock
        def state():
            return (PIL.Image.MAX_IMAGE_PIXELS, warnings.filters[:], torch.get_num_threads(),
                    signal.getsignal(signal.SIGTERM), torch.backends.cuda.matmul.allow_tf32)
        before = state()
        import srgan
        assert state() == before
        assert not {"lpips", "torchvision", "matplotlib", "wandb"} & {*sys.modules}
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
