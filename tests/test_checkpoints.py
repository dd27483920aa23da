"""Section 7: checkpoints that come back as they were, and files that are none."""
import contextlib
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, randomised, same

import srgan


def refuse(path, words):
    """load_generator refuses the file with one line that names it."""
    with pytest.raises(srgan.InputError, match=words) as error:
        srgan.load_generator(path)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)


# What comes back

@pytest.mark.parametrize("arch", [{}, {"block": "rrdb"}, {"scale": 2, "tanh": True}])
def test_generators_come_back_as_they_were_and_in_float32(arch, tmp_path):
    """save_checkpoint, load_generator."""
    g = randomised(srgan.make_generator(**{"channels": 4, "n_blocks": 2, **arch}))
    g(torch.rand(2, 3, 8, 8))                                    # batch norm's statistics
    srgan.save_checkpoint(tmp_path / "g.pth", g.half())
    loaded = srgan.load_generator(tmp_path / "g.pth")
    assert same(dict(loaded.state_dict()), dict(g.float().state_dict()))
    assert loaded.arch == g.arch
    assert type(loaded) is type(g)


def test_a_loaded_generator_is_in_eval_mode_and_can_be_trained_further(tmp_path, generator):
    """load_generator."""
    srgan.save_checkpoint(tmp_path / "g.pth", generator)
    loaded = srgan.load_generator(tmp_path / "g.pth")
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())


def test_a_checkpoint_holds_what_is_saved_with_the_generator(tmp_path, generator):
    """save_checkpoint, load_checkpoint."""
    srgan.save_checkpoint(tmp_path / "g.pth", generator, step=3, best={"psnr": 20.0})
    state = srgan.load_checkpoint(tmp_path / "g.pth")
    assert state["step"] == 3
    assert state["best"] == {"psnr": 20.0}


def test_json_is_valid_whatever_was_measured(tmp_path):
    """write_json: JSON has neither inf nor NaN."""
    srgan.write_json(tmp_path / "a.json", {"psnr": [float("inf"), float("nan"), 1.5]})
    text = (tmp_path / "a.json").read_text()
    assert text.split() == ["{", '"psnr":', "[", "null,", "null,", "1.5", "]", "}"]


def test_ema_moves_an_average_by_its_decay():
    """ema_, float_state: batch norm's counter of updates is not averaged."""
    network = torch.nn.BatchNorm2d(2).double()
    other = randomised(torch.nn.BatchNorm2d(2).double())
    expected = [0.9 * a + 0.1 * b for a, b in zip(network.parameters(), other.parameters())]
    srgan.ema_(srgan.float_state(network), srgan.float_state(other), 0.9)
    for found, value in zip(network.parameters(), expected):
        assert (found - value).abs().max() <= 1e-9
    assert len(srgan.float_state(network)) == 4


# What is refused

class Code:
    """An object whose unpickling calls a function."""

    def __reduce__(self):
        return os.mkdir, ("code-ran",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(tmp_path, monkeypatch, form):
    """load_checkpoint."""
    monkeypatch.chdir(tmp_path)
    content = {"generator": {"w": Code()}, "arch": {}}
    path = Path("evil.pth")
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    refuse(path, "not a checkpoint")
    assert not Path("code-ran").exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert Path("code-ran").exists()                             # so the file was a trap


@pytest.fixture
def good(tmp_path, generator):
    """The content of a good checkpoint."""
    srgan.save_checkpoint(tmp_path / "good.pth", generator)
    return torch.load(tmp_path / "good.pth")


def refuse_content(content, tmp_path, words):
    torch.save(content, tmp_path / "bad.pth")
    refuse(tmp_path / "bad.pth", words)


@pytest.mark.parametrize("key, value, words", [
    ("scale", 2, "upsample.3"), ("scale", 3, "scale 3"), ("scale", "4", "scale '4'"),
    ("scale", 4.0, "scale 4.0"), ("n_blocks", 300, "300 blocks"), ("n_blocks", "3", "str"),
    ("n_blocks", 2, "blocks.2"), ("channels", 10 ** 9, "too many"),
    ("channels", -1, "no generator that train.py wrote"), ("channels", "8", "str"),
    ("block", "x", "no generator that train.py wrote"),
    ("block", [], "no generator that train.py wrote"),
    ("colours", 3, "colours")])
def test_an_architecture_that_cannot_be_is_refused(good, tmp_path, key, value, words):
    """load_generator, make_generator."""
    good["arch"][key] = value
    refuse_content(good, tmp_path, words)


@pytest.mark.parametrize("change, words", [
    (lambda bias: bias[:2], "tail.bias"),
    (lambda bias: bias.to("meta"), "tail.bias does not hold plain numbers"),
    (lambda bias: bias.to_sparse(), "tail.bias does not hold plain numbers"),
    (lambda bias: bias.to(torch.complex64), "tail.bias does not hold plain numbers"),
    (lambda bias: bias.int(), "no generator"),
    (lambda bias: 3, "no generator")], ids=["short", "meta", "sparse", "complex", "int", "number"])
def test_weights_that_do_not_fit_are_refused(good, tmp_path, change, words):
    """load_generator."""
    good["generator"]["tail.bias"] = change(good["generator"]["tail.bias"])
    refuse_content(good, tmp_path, words)


def test_missing_and_unknown_weights_are_refused_by_name(good, tmp_path):
    """load_generator."""
    bias = good["generator"].pop("tail.bias")
    refuse_content(good, tmp_path, "tail.bias")
    good["generator"]["tail.bias"] = bias
    good["generator"]["more"] = bias
    refuse_content(good, tmp_path, "more")


def test_other_files_of_torch_are_refused(good, tmp_path):
    """load_generator, load_checkpoint: of another project, a list, a tensor."""
    refuse_content({"state_dict": good["generator"]}, tmp_path, "no generator that train.py wrote")
    refuse_content([1, 2], tmp_path, "not a checkpoint but a list")
    refuse_content(torch.zeros(3), tmp_path, "not a checkpoint but a Tensor")


def test_other_files_are_refused(good, tmp_path):
    """load_checkpoint: cut short, a text, empty, missing, a folder."""
    path = tmp_path / "good.pth"
    for content in (path.read_bytes()[:9000], b"hello", b""):
        path.write_bytes(content)
        refuse(path, "not a checkpoint")
    refuse(tmp_path / "absent.pth", "no such file")
    refuse(tmp_path, "not a checkpoint")


# Files that are written whole or not at all

def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    """replacing."""
    file = tmp_path / "file.txt"
    file.write_text("old")
    with pytest.raises(RuntimeError):
        with srgan.replacing(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_process_left_behind_is_replaced(tmp_path):
    """replacing: the temporary name depends only on the path."""
    with srgan.replacing(tmp_path / "file.txt") as temporary:
        temporary.write_text("whole")
    temporary.write_text("half")
    with srgan.replacing(tmp_path / "file.txt") as again:
        again.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_a_link_stays_a_link(tmp_path):
    """replacing."""
    (tmp_path / "link.json").symlink_to(tmp_path / "file.json")
    srgan.write_json(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "file.json").read_text() == '"new"\n'


def test_a_full_disk_is_one_line(tmp_path, generator, monkeypatch):
    """save_checkpoint."""
    def fail(*args):
        raise OSError("full")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(srgan.InputError, match="g.pth: cannot be written"):
        srgan.save_checkpoint(tmp_path / "g.pth", generator)
    assert not list(tmp_path.iterdir())


# Scripts

@pytest.mark.parametrize("error, status, words", [
    (srgan.InputError("what to do"), 2, "what to do"), (FileNotFoundError("a.txt"), 2, "a.txt"),
    (MemoryError(), 2, "out of memory"), (RuntimeError("CUDA out of memory"), 2, "smaller"),
    (KeyboardInterrupt(), 130, "")])
def test_what_a_user_can_cause_ends_a_script_with_a_line_and_a_status(
        monkeypatch, capsys, error, status, words):
    """srgan.run, is_out_of_memory."""
    def main():
        raise error
    monkeypatch.setattr(signal, "signal", lambda *args: None)    # leave pytest's handlers
    with pytest.raises(SystemExit) as exit:
        srgan.run(main)
    err = capsys.readouterr().err
    assert exit.value.code == status
    assert words in err
    assert err.count("\n") == (status == 2)


def test_importing_srgan_changes_nothing_in_the_host_program():
    """srgan, the module."""
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
