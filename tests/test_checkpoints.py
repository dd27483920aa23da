"""Section 7: files that come back as they were, and hostile ones that do no harm."""
import copy
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
from conftest import LAUGHS, OLD, ROOT, memory, photo, same
from torch import nn

import srgan


@pytest.fixture
def path(generator, tmp_path):
    """A good checkpoint."""
    srgan.save_checkpoint(tmp_path / "good.pth", generator)
    return tmp_path / "good.pth"


def refuse(path, words=""):
    """The generator in it is refused in one line that names the file."""
    with pytest.raises(srgan.InputError, match=words) as error, warnings.catch_warnings():
        warnings.simplefilter("error")                           # nor does anything warn
        srgan.load_generator(path)
    assert path.name in str(error.value) and "\n" not in str(error.value)


# Saving and loading

@pytest.mark.parametrize("arch", [{}, {"block": "rrdb"}, {"scale": 2, "tanh": False}])
def test_generators_come_back_as_they_were(arch, tmp_path):
    g = srgan.make_generator(**{"channels": 4, "n_blocks": 2, **arch})
    for p in g.parameters():
        nn.init.normal_(p)
    g(torch.rand(2, 3, 8, 8))
    srgan.save_checkpoint(tmp_path / "g.pth", g, stage="srresnet", step=3)
    loaded = srgan.load_generator(tmp_path / "g.pth")
    assert not loaded.training and loaded.arch == g.arch and type(loaded) is type(g)
    assert same({**loaded.state_dict()}, {**g.state_dict()})
    state = srgan.load_checkpoint(tmp_path / "g.pth")
    assert (state["stage"], state["step"]) == ("srresnet", 3)
    assert [file.name for file in tmp_path.iterdir()] == ["g.pth"]
    state["generator"] = {key: value.half() if value.is_floating_point() else value
                          for key, value in state["generator"].items()}
    torch.save(state, tmp_path / "half.pth")                     # as the bundled weights are
    for key, value in srgan.load_generator(tmp_path / "half.pth").state_dict().items():
        assert value.dtype == g.state_dict()[key].dtype
        assert torch.allclose(value, g.state_dict()[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", sorted(OLD.glob("*.pth")), ids=lambda path: path.stem)
def test_checkpoints_of_older_versions_load(path):
    generator = srgan.load_generator(path)
    saved = torch.load(path, weights_only=True)["generator"]
    assert generator.arch == {"scale": 4, "channels": 4, "n_blocks": 1, "tanh": True,
                              "block": "residual"}
    assert same(saved, dict(generator.state_dict()))
    assert srgan.upscale(generator, photo(8, 9)).shape == (32, 36, 3)


def test_a_write_that_fails_leaves_the_old_file_and_what_it_left_is_replaced(
        tmp_path, generator, monkeypatch):
    file, link = tmp_path / "file.txt", tmp_path / "link.txt"
    srgan.write_json(file, "old")
    with pytest.raises(RuntimeError), srgan.replacing(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(srgan.InputError, match="cannot be written"):
        monkeypatch.setattr(torch, "save", lambda *args: (_ for _ in ()).throw(OSError("full")))
        srgan.save_checkpoint(file, generator)
    assert file.read_text() == '"old"\n' and list(tmp_path.iterdir()) == [file]
    temporary.write_text("left by a killed process"), link.symlink_to(file)
    with open(file) as reader:                                   # goes on in the old file
        srgan.write_json(link, "new")
        assert reader.read() == '"old"\n'
    assert link.is_symlink() and file.read_text() == '"new"\n' and not temporary.exists()


# Hostile files


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "least"])
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    content, path = {"generator": {"w": faults.Code()}, "arch": faults.Code()}, Path("evil.pth")
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    elif form == "least":                                        # that torch takes for a checkpoint
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("evil/data.pkl", pickle.dumps(content, protocol=2))
            archive.writestr("evil/version", "3\n")
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    refuse(path, "no checkpoint of plain tensors")
    assert not Path("code-ran").exists()


def strange_states(good):
    """{name: (what is in the file, words of the message)}"""
    weights = good["generator"]
    bias, huge = weights["tail.bias"], torch.zeros(1).expand(3, 10 ** 6, 9, 9)

    def change(key, value):
        return {**good, "generator": {**weights, key: value}}

    def arch(**changes):
        return {**good, "arch": {**good["arch"], **changes}}
    return {
        "more": (change("tail.more", bias), "tail.more is on one side"),
        "nan": (change("tail.bias", bias * torch.nan), "not finite"),
        "shape": (change("tail.bias", torch.zeros(4)), r"no tensor of torch.float32 \(3,\)"),
        "expanded": ({**change("tail.weight", huge), **arch(channels=10 ** 6)}, "no generator"),
        "wide": (arch(channels=10 ** 9), "no generator can be"),
        "deep": (arch(n_blocks=10 ** 12), "no generator can be"),
        "scale": (arch(scale=2 ** 40), "no generator can be"),
        "x2": (arch(scale=2), "not a generator"), "block": (arch(block="x"), "no generator can be"),
        "laughs": (arch(block=LAUGHS), "arch.block must be of type str"),
        "extra": (arch(extra=1), "extra is on one side"), "keys": (arch(**{"\n": 1}), "not a gen"),
        "none": ({**good, "arch": None}, "no checkpoint of train.py"),
        "other project": ({"state_dict": weights}, "no checkpoint of train.py"),
        "list": ([1, 2], "no checkpoint but a list"), "tensor": (bias, "but a Tensor")}


def test_strange_checkpoints_are_one_line_each_and_take_no_memory(path, tmp_path):
    states = strange_states(torch.load(path))
    for name, (content, _) in states.items():
        torch.save(content, tmp_path / f"{name}.pth")

    def refuse_all():
        for name, (_, words) in states.items():
            refuse(tmp_path / f"{name}.pth", words)
    assert memory(refuse_all) < 50
    for content in path.read_bytes()[:9000], b"hello", b"":
        (tmp_path / "cut.pth").write_bytes(content)
        refuse(tmp_path / "cut.pth", "no checkpoint of plain tensors")
    for file in (tmp_path / "absent.pth", tmp_path):
        refuse(file, "no such file|not a file")


def plain_zip(path, n_entries, size, method=zipfile.ZIP_STORED):
    """A checkpoint of n_entries storages of `size` zero bytes each, {"0": tensor, ...}."""
    torch.save({str(i): torch.zeros(size, dtype=torch.uint8) for i in range(n_entries)}, path)
    source = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", method) as archive:
        for entry in source.infolist():
            archive.writestr(entry.filename, source.read(entry))


compressed = functools.partial(plain_zip, method=zipfile.ZIP_DEFLATED)


def overlap(path, n_entries, size):
    """The same, the storages all on the bytes of one."""
    plain_zip(path, n_entries, size)
    source = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w") as archive:
        for entry in source.infolist():
            if entry.filename.split("/data/")[-1] in map(str, range(1, n_entries)):
                archive.filelist.append(copy.copy(first))
                archive.filelist[-1].filename = entry.filename
            else:
                archive.writestr(entry.filename, source.read(entry))
            if entry.filename.endswith("/data/0"):
                first = archive.filelist[-1]


def two_directories(path, n_entries, size):
    """The same; the end record names one directory, zipfile reads that before the end record."""
    overlap(path, n_entries, size)
    content = path.read_bytes()
    length, start = struct.unpack("<II", content[-10:-2])
    harmless, at = bytearray(content[start:start + length]), 0
    while at < length:                                           # entries without any bytes
        harmless[at + 20:at + 28] = bytes(8)
        at += 46 + sum(struct.unpack("<HHH", harmless[at + 28:at + 34]))
    path.write_bytes(content[:-22] + harmless + content[-22:])


def bytes_from_nothing(path, n_entries, size):
    """A pickle that asks for an array of bytes of a size that it names."""
    number = struct.pack("<i", n_entries * size)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02cbuiltins\nbytearray\nJ" + number + b"\x85R.")
        archive.writestr("a/version", "3\n")


@pytest.mark.parametrize("bomb", [overlap, two_directories, bytes_from_nothing, compressed],
                         ids=["overlap", "directories", "bytes", "compressed"])
def test_a_small_file_takes_no_more_memory_than_its_size(bomb, tmp_path):
    bomb(tmp_path / "bomb.pth", 100, 1_000_000)                  # 100 MB when unpacked
    assert (tmp_path / "bomb.pth").stat().st_size < 3e6
    assert memory(lambda: refuse(tmp_path / "bomb.pth", "of plain tensors")) < 30
    plain_zip(tmp_path / "plain.pth", 3, 100_000)                # the same without a trick
    assert list(srgan.load_checkpoint(tmp_path / "plain.pth")) == ["0", "1", "2"]


# What is loaded has the structure of what it replaces

def test_check_like_takes_what_is_alike_and_names_what_differs():
    fresh = {"step": 3, "loss": 0.5, "name": "a", "adam": {"0": {"exp_avg": torch.zeros(2, 3)}}}
    srgan.check_like({**fresh, "step": 5, "loss": -1.0, "name": "b"}, fresh, "training")
    changed = [({**fresh, "step": 3.0}, "training.step must be of type int"),
               ({**fresh, "step": True}, "training.step must be of type int"),
               ({**fresh, "loss": float("nan")}, "training.loss"),
               ({**fresh, "loss": float("inf")}, "training.loss"),
               ({**fresh, "name": LAUGHS}, "training.name must be of type str"),
               ({**fresh, "adam": {}}, "training.adam does not fit: 0 is on one side"),
               ({**fresh, "more": 1}, "training does not fit: more is on one side"),
               (None, "training does not fit"), ([], "does not fit")]
    for tensor in (torch.zeros(3, 2), torch.zeros(2, 3).double(), torch.zeros(2, 3).int(), 0.0,
                   torch.zeros(1, 3).expand(2, 3), torch.full((2, 3), torch.nan),
                   torch.zeros(2, 3, device="meta"), torch.zeros(2, 3).to_sparse(), [[0.0]]):
        changed.append(({**fresh, "adam": {"0": {"exp_avg": tensor}}}, "adam.0.exp_avg"))
    for saved, words in changed:
        with pytest.raises(srgan.InputError, match=words) as error:
            srgan.check_like(saved, fresh, "training")
        assert len(str(error.value)) < 300 and "\n" not in str(error.value)


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
