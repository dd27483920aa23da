"""Faults that a run, a batch or a checkpoint may meet, in numbers. A program for Linux, not a test:

    python tests/faults.py kill [--times 50]       SIGKILL a training at random, then --resume
    python tests/faults.py fuzz [--files 3000]     broken images through the three scripts
    python tests/faults.py hostile [--files 300]   checkpoints made to do harm, through all three
    python tests/faults.py cases                   CASES below

Prints what was tried and what happened; a fault ends it with exit status 1: a traceback, a crash,
a hang, code that ran, or a process that took 1 GB more than at rest. The tests hold short forms.
"""
import argparse
import copy
import functools
import importlib
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import srgan  # noqa: E402
from conftest import TINY, photo, same  # noqa: E402

SAVE = {"png": {}, "jpeg": {"quality": 90}, "webp": {"quality": 80},
        "tiff": {"compression": "tiff_lzw"}, "gif": {}}
UPSCALE = ["photos/0.png", "out.png", "--ckpt", "tiny.pth", "--precision", "fp32"]
TRAIN = ["--data", "photos", "--device", "cpu", "--precision", "fp32", *TINY,
         "--set", "gan.content_weight=0", "--set", "gan.pixel_weight=1", "--steps-per-epoch", "2",
         "--set", "discriminator.channels=[4,4]", "--set", "discriminator.pool=1", "--epochs", "1"]
CASES = [  # (what, script, its arguments, exit statuses, redirections and environment)
    ("closed stdout", "upscale", "{upscale}", {0}, ">&-"),
    ("closed stderr", "upscale", "{upscale}", {0}, "2>&-"),
    ("both closed", "train", "{train}", {0}, ">&- 2>&-"),
    ("a reader that is gone", "upscale", "{upscale}", {0, 2}, ">&{gone}"),
    ("a full stdout", "evaluate", "--data photos --no-lpips", {0, 2}, ">/dev/full"),
    *((f"device {name}", script, args + f" --device {name}", {2}, "") for name in ("meta", "xpu:99")
      for script, args in (("upscale", "{upscale}"), ("train", "{train}"),
                           ("evaluate", "--data photos"))),
    ("a tile of 400 digits", "upscale", "{upscale} --tile 1" + 400 * "0", {0}, ""),
    ("WORLD_SIZE=abc", "train", "{train}", {2}, "WORLD_SIZE=abc"),
    *((f"SIGINT after {s} s", script, args, {0, 130, -2}, s) for s in (0.2, 0.5, 1, 2, 4)
      for script, args in (("upscale", "{upscale}"), ("train", "{train}"))),
    ("names that are not UTF-8", "train", "{train} --data odd --set split=[50,50,0]", {0}, ""),
    ("a broken metrics.csv", "train", "{train} --resume --out edited --epochs 2", {2}, ""),
    ("a TIFF with a huge tile", "upscale", "tile.tif out.png --ckpt tiny.pth", {2}, ""),
    ("a PNG of 170 megapixels in one row", "upscale", "row.png out.png --ckpt tiny.pth", {2}, ""),
    ("the same, to train on", "train", "{train} --data bombs", {2}, ""),
    *(("empty arguments", script, args + " ''", {2}, "") for script, args in (
        ("upscale", "photos/0.png"), ("upscale", "{upscale} --ckpt"), ("evaluate", "--data"),
        ("evaluate", "--data photos --json"), ("train", "{train} --data"),
        ("train", "{train} --set"), ("train", "{train} --out"),
        ("train", "{train} --config"), ("train", "{train} --preset"))),
    ("a setting's name of a million characters", "train", "{train} --config long.json", {2}, ""),
    ("a setting's name of 100,000", "train", "{train} --set " + 10 ** 5 * "n" + "=1", {2}, ""),
]


def prepare(folder):
    """Photos and a small generator in `folder`."""
    (folder / "photos").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(photo(60, 72, i)).save(folder / f"photos/{i}.png")
    srgan.save_checkpoint(folder / "tiny.pth", srgan.Generator(channels=8, n_blocks=1))


@functools.cache
def at_rest():
    """MB that a process takes once everything is imported."""
    for name in ("train", "evaluate", "upscale"):
        importlib.import_module(name)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2 ** 20


def call(folder, script, *args, allowed=(0, 2), seconds=100):
    """Run a script in a forked process: (exit status, output, MB at its peak, what is wrong)."""
    at_rest()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            sys.stdout = sys.stderr = open(folder / "log", "w", errors="surrogateescape")
            os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stdout.fileno(), 2)
            os.chdir(folder)
            resource.setrlimit(resource.RLIMIT_DATA, (2 ** 33, 2 ** 33))
            signal.alarm(seconds)
            torch.set_num_threads(1)                             # other threads are not forked
            sys.argv = [f"{script}.py", *map(str, args)]
            srgan.run(importlib.import_module(script).main)
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return finish(pid, folder, allowed)


def finish(pid, folder, allowed):
    """Wait for a process that writes to folder/log; see call."""
    _, status, usage = os.wait4(pid, 0)
    status, mb = os.waitstatus_to_exitcode(status), usage.ru_maxrss / 1024
    output = (folder / "log").read_text(errors="replace")
    faults = [f"exit status {status}"] * (status not in allowed) + \
        ["traceback"] * ("Traceback" in output or "Exception ignored" in output) + \
        [f"{mb:.0f} MB"] * (mb > 1024 + at_rest()) + \
        ["long line"] * (max(map(len, output.splitlines()), default=0) > 2000)
    return status, output, mb, faults and f"{', '.join(faults)}: {output[-1000:]}"


def kill(folder, times, seed=0):
    """Kill a run at `times` random moments and go on each time; {what happened: how often}.

    The result must be the undisturbed one, bit for bit.
    """
    rng, seen = random.Random(seed), {"killed": 0, "inside a save": 0, "finished early": 0}
    prepare(folder)

    def training(out, *more):
        return [sys.executable, ROOT / "train.py", *TRAIN, "--stage", "srresnet", "--out", out,
                "--epochs", "40", "--set", "checkpoint_every=5", *more]
    subprocess.run(training("whole"), check=True, capture_output=True, cwd=folder)
    latest = folder / "killed/checkpoint_latest.pth"
    while seen["killed"] < times:
        process = subprocess.Popen(training("killed", *["--resume"] * latest.exists()), cwd=folder,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output = b""
        while b"to validate on" not in output and (line := process.stdout.readline()):
            output += line
        time.sleep(rng.uniform(0, 0.6))
        deadline = time.monotonic() + 2 * (seen["killed"] % 2)   # every other time, inside a save
        while time.monotonic() < deadline and process.poll() is None:
            if any(folder.glob("killed/.*")):
                break
        process.send_signal(signal.SIGKILL)
        output, status = output + process.stdout.read(), process.wait()
        seen["killed"] += status == -signal.SIGKILL
        seen["inside a save"] += status == -signal.SIGKILL and any(folder.glob("killed/.*"))
        seen["finished early"] += status == 0
        assert status in (0, -signal.SIGKILL), output.decode()
        if latest.exists() and srgan.load_checkpoint(latest)["step"] == 80:
            shutil.rmtree(folder / "killed")                     # done; begin again
    subprocess.run(training("killed", *["--resume"] * latest.exists()), check=True, cwd=folder,
                   capture_output=True)
    whole, killed = map(srgan.load_checkpoint, (folder / "whole" / latest.name, latest))
    assert killed["step"] == 80
    assert all(same(whole[key], killed[key]) for key in ("generator", "training", "best"))
    assert not list(folder.glob("killed/.*")), "half-written files left"
    return seen


def mutate(data, rng, suffix=""):
    """One of: bits flipped, cut off, a part doubled or zeroed, or a size that lies."""
    data, kind, a = bytearray(data), rng.randrange(5), rng.randrange(len(data))
    if kind == 0:
        for _ in range(rng.choice((1, 3, 10, 100))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[a:]
    elif kind == 2:
        data[a:a] = data[a:a + rng.randrange(1, 500)]
    elif kind == 3:
        data[a:a + 64] = bytes(len(data[a:a + 64]))
    elif suffix == "png":                                        # its checksum right
        data[16:24] = struct.pack(">II", *rng.choices((0, 1, 60, 1999, 60000, 2 ** 31), k=2))
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        for _ in range(8):                                       # sizes stand near the beginning
            data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
    return bytes(data)


def fuzz(folder, count, seed=0):
    """The three scripts on `count` broken images; {what was seen: how often}."""
    rng, seen, broken = random.Random(seed), {}, folder / "broken"
    prepare(folder)
    broken.mkdir()
    originals = {suffix: io.BytesIO() for suffix in SAVE}
    for suffix, stream in originals.items():
        Image.fromarray(photo(60, 56)).save(stream, suffix, **SAVE[suffix])
    for i in range(count):
        suffix = list(SAVE)[i % len(SAVE)]
        data = mutate(originals[suffix].getvalue(), rng, suffix)
        (broken / f"{i:05d}.{suffix}").write_bytes(data)
    shutil.copy(folder / "photos/0.png", broken)
    for script, status, args in (
            ("upscale", 1, ["broken", "large", "--ckpt", "tiny.pth", "--max-megapixels", "4"]),
            ("evaluate", 1, ["--ckpt", "tiny.pth", "--data", "broken", "--no-lpips"]),
            ("train", 0, [*TRAIN, "--stage", "srresnet", "--data", "broken",
                          "--val", "photos"])):
        began = time.monotonic()
        _, output, mb, fault = call(folder, script, *args, allowed={status}, seconds=100 + count)
        assert not fault, fault
        if script == "upscale":
            refused = [line for line in output.splitlines() if line.startswith("broken/")]
            for line in refused:
                if "megapixels" in line:                         # the others have no such limit
                    (folder / line.partition(":")[0]).unlink()
        seen[f"{script}.py: seconds"] = round(time.monotonic() - began)
        seen[f"{script}.py: MB at its peak"] = round(mb)
    results = [path for path in (folder / "large").rglob("*") if path.is_file()]
    for path in results:
        Image.open(path).load()
    assert len(results) + len(refused) == count + 1, (len(results), len(refused))
    return {"upscaled": len(results) - 1, "refused": len(refused)} | seen


class Code:
    """What unpickling turns into a call."""

    def __reduce__(self):
        return os.mkdir, ("code-ran",)


def junk(old, rng):
    """Something else in the place of `old`."""
    nan, nested, x = float("nan"), [], torch.zeros(2, 3)
    for _ in range(60):                                          # 2^60 lists for who prints it
        nested = [nested, nested]
    if isinstance(old, torch.Tensor) and old.numel() < 2 ** 24 and rng.random() < 0.7:
        x = torch.full(old.shape, 0.5)
        return rng.choice((
            x.double(), x.half(), x.flatten()[:-1], x[None], x.int(), x.bool(), x.cfloat(), -x,
            x * nan, x * 1e30, x.to_sparse(), x.clone().requires_grad_(), x.new_empty(0),
            x.to("meta"), x.new_zeros(()).expand(x.shape),
            x.new_zeros(x.numel() + 1).as_strided(x.shape, [0] * x.dim(), x.numel())))
    return rng.choice((
        None, True, -1, 0, 10 ** 30, 10 ** 600, -2 ** 63, 1e-300, nan, float("inf"), "", b"x",
        "x" * 10 ** 6, "\x1b[2J\n", [], {}, (), nested, [nested] * 3, {1: {}}, {(1, 2): 3}, [1] * 3,
        {"mean": nan, "std": 0.0, "epoch": 1}, torch.float32, torch.Size([2]), Code(), x, x.half(),
        x[0, 0], x * nan, x.to_sparse(), x[:1, :1].expand(2 ** 20, 2 ** 20), x.to("meta"),
        x[0, 0].to("meta")))


def spots(tree):
    """All (dictionary or list, key) in nested ones."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from spots(value)


def replace(state, rng):
    """One to three entries of the state, or of a part of it, are replaced or renamed."""
    part = functools.reduce(lambda tree, key: tree[key], rng.choice((
        (), ("generator",), ("arch",), ("config",), ("best",), ("baselines",), ("training",),
        ("training", "generator_adam"), ("training", "discriminator_adam"))), state)
    top = [(part, key) for key in part]
    for tree, key in rng.choices(rng.choice((top, [*spots(part)])), k=rng.randint(1, 3)):
        if rng.random() < 0.1 and isinstance(tree, dict) and key in tree:
            tree[rng.choice((None, 10 ** 600, (1, 2), f"{key}x", "x" * 10 ** 6))] = tree.pop(key)
        else:
            tree[key] = junk(tree.get(key) if isinstance(tree, dict) else 0, rng)
    return zipped(state)


def zipped(state, compression=zipfile.ZIP_STORED, move=lambda offset: offset, times=1):
    """A checkpoint, as bytes, with the places that its directory names changed."""
    saved, made = io.BytesIO(), io.BytesIO()
    torch.save(state, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(made, "w", compression) as archive:
        archive.writestr("filler", bytes(2 ** 17), zipfile.ZIP_STORED)
        for info in source.infolist():
            archive.writestr(info.filename, source.read(info))
            archive.filelist[-1].header_offset = move(archive.filelist[-1].header_offset)
        archive.filelist[:] = archive.filelist[1:] * times
    return made.getvalue()


def two_directories(state):
    """Torch takes the directory at the offset that the end record names, in which all entries
    overlap; Python takes the one that ends where the end record begins."""
    bad = zipped(state, move=lambda offset: 2 ** 17 + 36)
    size = struct.unpack("<I", bad[-10:-6])[0]
    good = zipped(state, move=lambda offset: offset - size)
    return bad[:-22] + good[-22 - size:-22] + bad[-22:]


HOSTILE = {  # kind: function of a checkpoint and a random.Random that gives a file's bytes
    "code": lambda state, rng: zipped({**state, rng.choice([*state]): Code()}),
    "compressed entries": lambda state, rng: zipped(state, zipfile.ZIP_DEFLATED),
    "entries that overlap": lambda state, rng: zipped(state, move=lambda offset: 2 ** 17 + 36),
    "repeated entries": lambda state, rng: zipped(state, times=99),
    "two directories": lambda state, rng: two_directories(state),
    "a broken file": lambda state, rng: mutate(zipped(state), rng),
    "no dictionary": lambda state, rng: zipped(junk(0, rng)),
    "other entries": replace,
}


def hostile(folder, count, seed=0):
    """`count` checkpoints made to do harm, each as --ckpt and --resume; {what was seen: how often}.

    Raises AssertionError with all faults; the files that did harm are kept beside `folder`.
    """
    rng, seen, faults, most = random.Random(seed), Counter(), [], 0
    prepare(folder)
    train = [*TRAIN, "--stage", "gan"]
    assert not call(folder, "train", *train, "--init", "tiny.pth", "--out", "base", allowed={0})[3]
    base = srgan.load_checkpoint(folder / "base/checkpoint_latest.pth")
    path = folder / "hostile.pth"
    for i in range(count):
        kind = list(HOSTILE)[-1 if i % 3 else i // 3 % len(HOSTILE)]
        path.write_bytes(HOSTILE[kind](copy.deepcopy(base), rng))
        for script, args in (("upscale", [*UPSCALE, "--ckpt", path, "--overwrite"]),
                             ("evaluate", ["--ckpt", path, "--data", "photos", "--no-lpips"]),
                             ("train", [*train, "--resume", path, "--epochs", "2"])):
            status, _, mb, fault = call(folder, script, *args)
            seen[f"{kind}, {script}.py: {'refused' if status else 'accepted'}"] += 1
            most = max(most, mb)
            if fault or (folder / "code-ran").exists():
                faults.append(f"{kind}, file {i}, {script}.py: {fault or 'code ran'}")
                print(faults[-1], file=sys.stderr)
                shutil.copy(path, folder.with_name(f"{folder.name}-{i}.pth"))
        shutil.rmtree(folder / "runs", ignore_errors=True)
    assert not faults, f"{len(faults)} faults: {faults}"
    return {**dict(sorted(seen.items())), "MB at the peak": round(most)}


def write_cases(folder):
    """The files that CASES name."""
    prepare(folder)
    for i in range(4):
        os.makedirs(folder / "odd", exist_ok=True)
        shutil.copy(folder / "photos/0.png", os.fsencode(folder / "odd") + b"/\xff\xfe%d.png" % i)
    call(folder, "train", *TRAIN, "--stage", "srresnet", "--out", "edited")
    (folder / "edited/metrics.csv").write_text("epoch,update\n1,many\n")
    (folder / "long.json").write_text(json.dumps({"n" * 10 ** 6: 1}))
    tags = [(256, 16), (257, 16), (258, 8), (259, 1), (262, 1), (277, 1), (322, 26000),
            (323, 26000), (324, 200), (325, 64)]
    (folder / "tile.tif").write_bytes(struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4 + 26000))
    packer, rows = zlib.compressobj(1), bytes(34 * 10 ** 6)
    data = b"".join(packer.compress(rows) for _ in range(10)) + packer.flush()
    (folder / "bombs").mkdir()
    with open(folder / "row.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, part in ((b"IHDR", struct.pack(">IIBBBBB", 1, 170_000_000, 8, 0, 0, 0, 0)),
                           (b"IDAT", data), (b"IEND", b"")):
            file.write(struct.pack(">I", len(part)) + name + part
                       + struct.pack(">I", zlib.crc32(name + part)))
    for name in ("row.png", "tile.tif"):
        shutil.copy(folder / name, folder / "bombs")


def cases(folder, seed=0):
    """All CASES, in processes of their own; {what was tried: exit status}."""
    write_cases(folder)
    seen, faults, results, (reader, writer) = {}, [], set(), os.pipe()
    os.close(reader)                                             # who writes there gets EPIPE
    values = {"upscale": shlex.join([*UPSCALE, "--overwrite"]),
              "train": shlex.join([*TRAIN, "--stage", "srresnet"])}
    for what, script, args, allowed, how in CASES:
        how, after = ("", how) if isinstance(how, float | int) else (how, None)
        env = dict([how.split("=")]) if "=" in how else {}
        args = args.format(**values)
        args += " --out runs" * ("--out" not in args and script == "train")
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                ["sh", "-c", f'exec "$0" "$@" {"" if env else how.format(gone=writer)}',
                 sys.executable, ROOT / f"{script}.py", *shlex.split(args)], cwd=folder,
                env=os.environ | env, stdout=log, stderr=log, pass_fds=[writer])
        if after:
            time.sleep(after)
            os.kill(process.pid, signal.SIGINT)
        status, output, mb, fault = finish(process.pid, folder, allowed)
        process.returncode = status
        if script == "upscale" and status == 0:
            results.add((folder / "out.png").read_bytes())
        seen[f"{script}.py, {what}"] = status
        if fault:
            faults.append(f"{what}, {script}.py: {fault}")
            print(faults[-1], file=sys.stderr)
        shutil.rmtree(folder / "runs", ignore_errors=True)
    assert not faults and len(results) == 1, f"{len(faults)} faults: {faults}"
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "fuzz", "hostile", "cases"))
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--files", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args, began = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        seen = {"kill": lambda: kill(folder, args.times, args.seed),
                "fuzz": lambda: fuzz(folder, args.files or 3000, args.seed),
                "hostile": lambda: hostile(folder, args.files or 300, args.seed),
                "cases": lambda: cases(folder)}[args.what]()
    print(f"{args.what}, {time.monotonic() - began:.0f} s: "
          + ", ".join(f"{what} {n}" for what, n in seen.items()))


if __name__ == "__main__":
    main()
