"""Section 7: files that come back as they were, and hostile ones that do no harm."""
import functools
import io
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import faults
import pytest
import torch
from conftest import LAUGHS, OLD, ROOT, memory, photo, randomised, same

import srgan


@pytest.fixture
def path(generator, tmp_path):
    """A good checkpoint."""
    srgan.save_checkpoint(tmp_path / "good.pth", generator)
    return tmp_path / "good.pth"


def refuse(path, words="no checkpoint of plain tensors"):
    """The generator in the file is refused with one line that names the file; nothing warns."""
    with pytest.raises(srgan.InputError, match=words) as error, warnings.catch_warnings():
        warnings.simplefilter("error")
        srgan.load_generator(path)
    message = str(error.value)
    assert path.name in message and "\n" not in message and len(message) < 400


# Saving and loading

@pytest.mark.parametrize("arch", [{}, {"block": "rrdb"}, {"scale": 2, "tanh": False}])
def test_generators_come_back_as_they_were(arch, tmp_path):
    g = randomised(srgan.make_generator(**{"channels": 4, "n_blocks": 2, **arch}))
    g(torch.rand(2, 3, 8, 8))
    srgan.save_checkpoint(tmp_path / "g.pth", g, stage="srresnet", step=3)
    loaded = srgan.load_generator(tmp_path / "g.pth")
    assert not loaded.training and loaded.arch == g.arch and type(loaded) is type(g)
    assert same({**loaded.state_dict()}, {**g.state_dict()})
    state = srgan.load_checkpoint(tmp_path / "g.pth")
    assert (state["stage"], state["step"]) == ("srresnet", 3)


@pytest.mark.parametrize("path", sorted(OLD.glob("*.pth")), ids=lambda path: path.stem)
def test_checkpoints_of_older_versions_load(path):
    generator = srgan.load_generator(path)
    assert generator.arch == {"scale": 4, "channels": 4, "n_blocks": 1, "tanh": True,
                              "block": "residual"}
    assert same(torch.load(path, weights_only=True)["generator"], dict(generator.state_dict()))
    assert srgan.upscale(generator, photo(8, 9)).shape == (32, 36, 3)


def test_a_failed_write_leaves_the_old_file_and_the_next_one_leaves_no_trace_of_it(
        tmp_path, generator, monkeypatch):
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
    with open(file) as reader:                                   # still sees the old file
        srgan.write_json(link, "new")
        assert reader.read() == '"old"\n'
    assert link.is_symlink() and file.read_text() == '"new"\n' and not temporary.exists()


# Hostile files

@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    content, path = {"generator": {"w": faults.Code()}, "arch": faults.Code()}, Path("evil.pth")
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    refuse(path)
    assert not Path("code-ran").exists()


def test_strange_checkpoints_are_refused_in_one_line_and_little_memory(path, tmp_path):
    good, whole = torch.load(path), path.read_bytes()
    weights, huge = good["generator"], torch.zeros(1).expand(3, 10 ** 6, 9, 9)
    bias = weights["tail.bias"]                                  # float32 [3]

    def change(key, value, **arch):
        return {**good, "generator": {**weights, key: value}, "arch": {**good["arch"], **arch}}
    strange = [(change("tail.bias", other), r"tail.bias is no tensor of torch.float32 \(3,\)")
               for other in (bias.double(), bias.int(), bias[:2], torch.zeros(()).expand(3),
                             bias.to("meta"), bias.to_sparse(), bias.tolist())]
    strange += [(change("tail.bias", bias, **arch), words) for arch, words in (
        ({"extra": 1}, "extra is missing or unexpected"), ({"\n": 1}, "not a generator"),
        ({"scale": 2}, "not a generator"), ({"scale": 2 ** 40}, "no generator can be"),
        ({"channels": 10 ** 9}, "no generator can be"), ({"block": "x"}, "no generator can be"),
        ({"n_blocks": 10 ** 12}, "no generator can be"), ({"n_blocks": 3.0}, "must be of type int"),
        ({"block": LAUGHS}, "block must be of type str"), ({"tanh": 1}, "must be of type"))]
    strange += [
        (change("tail.bias", bias * torch.nan), "tail.bias is not finite"),
        (change("more", bias), "more is missing or unexpected"),
        (change("tail.weight", huge, channels=10 ** 6), "no generator can be"),
        ({**good, "arch": None}, "no checkpoint of train.py"),
        ({"state_dict": weights}, "no checkpoint of train.py"),    # of another project
        ([1, 2], "no checkpoint but a list"), (bias, "no checkpoint but a Tensor")]

    def refuse_all():
        for content, words in strange:
            torch.save(content, path)
            refuse(path, words)
    assert memory(refuse_all) < 50
    for content in whole[:9000], b"hello", b"":
        path.write_bytes(content)
        refuse(path)
    for file in (tmp_path / "absent.pth", tmp_path):
        refuse(file, "no such file|not a file")


def zipped(state, compression=zipfile.ZIP_STORED, move=lambda offset: offset, times=1):
    """A checkpoint, as bytes, with other offsets in its directory."""
    saved, made = io.BytesIO(), io.BytesIO()
    torch.save(state, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(made, "w", compression) as archive:
        archive.writestr("filler", bytes(2 ** 17), zipfile.ZIP_STORED)
        for info in source.infolist():
            archive.writestr(info.filename, source.read(info))
            archive.filelist[-1].header_offset = move(archive.filelist[-1].header_offset)
        archive.filelist[:] = archive.filelist[1:] * times
    return made.getvalue()


def bytes_from_nothing(state):
    """A pickle that asks for an array of 100 MB."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02cbuiltins\nbytearray\nJ"
                         + struct.pack("<i", 10 ** 8) + b"\x85R.")
        archive.writestr("a/version", "3\n")
    return content.getvalue()


@pytest.mark.parametrize("size, bomb", [
    (5 * 10 ** 7, functools.partial(zipped, compression=zipfile.ZIP_DEFLATED)),
    (10 ** 6, functools.partial(zipped, times=99)), (0, bytes_from_nothing)],
    ids=["compressed", "repeated", "bytes"])
def test_a_file_takes_no_more_memory_than_a_few_times_its_size(tmp_path, size, bomb):
    path = tmp_path / "bomb.pth"                                 # 50 to 100 MB when unpacked
    path.write_bytes(bomb({"0": torch.zeros(size, dtype=torch.uint8)}))
    assert path.stat().st_size < 3e6
    assert memory(lambda: refuse(path)) < 30


def test_if_a_file_has_two_directories_the_one_that_was_checked_is_read(path):
    """Torch would take the one at the offset in the end record, in which all entries overlap;
    Python takes the one that ends where the end record begins."""
    state = torch.load(path)
    bad = zipped(state, move=lambda offset: 2 ** 17 + 36)
    size = struct.unpack("<I", bad[-10:-6])[0]
    good = zipped(state, move=lambda offset: offset - size)
    path.write_bytes(bad[:-22] + good[-22 - size:-22] + bad[-22:])
    assert same(srgan.load_checkpoint(path), state)


def test_importing_srgan_changes_nothing_in_the_host_program():
    code = """if True:
        import lzma, signal, sys, warnings, PIL.Image, PIL.ImageFont, torch, tqdm, filelock
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
