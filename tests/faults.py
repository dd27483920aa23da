"""What may go wrong with a run, an image or a checkpoint, many times over. For Linux; not a test:

    python tests/faults.py kill [--times 50]       SIGKILL a training at random, then --resume
    python tests/faults.py fuzz [--times 3000]     broken images, given to the three scripts
    python tests/faults.py hostile [--times 300]   checkpoints made to do harm, given to all three

Prints what was tried and what happened. A fault ends it with exit status 1: a traceback, a crash, a
hang, code that ran, or a process that took over 1 GB. The suite holds short forms of these.
"""
import argparse
import copy
import importlib
import io
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import srgan  # noqa: E402
from conftest import SMALL, photo, same  # noqa: E402

SUFFIXES = "png", "jpeg", "webp", "tiff", "gif"
TRAIN = ["--data", "photos", *SMALL, "--set", "discriminator.channels=[4,4]",
         "--set", "discriminator.pool=1", "--steps-per-epoch", "2", "--epochs", "1"]


def launch(folder, script, *args, seconds=100):
    """Run a script in a forked process, with its output in folder/log; returns its id."""
    main, log = importlib.import_module(script).main, folder / "log"
    log.write_text("")
    if pid := os.fork():
        return pid
    status = 1
    try:
        sys.stdout = sys.stderr = open(log, "w", errors="surrogateescape")
        os.dup2(sys.stdout.fileno(), 1), os.dup2(sys.stdout.fileno(), 2)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_DATA, (2 ** 33, 2 ** 33))
        signal.alarm(seconds)
        torch.set_num_threads(1)                                 # other threads are not forked
        sys.argv = [f"{script}.py", *map(str, args)]
        srgan.run(main)
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def call(folder, script, *args, allowed=(0, 2), **options):
    """Run a script to its end: (exit status, output, MB at its peak, what is wrong)."""
    at_rest = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
    _, status, usage = os.wait4(launch(folder, script, *args, **options), 0)
    status, mb = os.waitstatus_to_exitcode(status), usage.ru_maxrss / 1024
    output = (folder / "log").read_text(errors="replace")
    wrong = {f"exit status {status}": status not in allowed, f"{mb:.0f} MB": mb > 1024 + at_rest,
             "traceback": "Traceback" in output or "Exception ignored" in output,
             "long line": max(map(len, output.splitlines()), default=0) > 2000}
    found = ", ".join(what for what, is_so in wrong.items() if is_so)
    return status, output, mb, found and f"{found}: {output[-1000:]}"


def kill(folder, times, rng):
    """Kill and resume runs, each of which must end like an undisturbed one, bit for bit."""
    args = [*TRAIN, "--stage", "srresnet", "--epochs", "40", "--set", "checkpoint_every=5"]
    assert not call(folder, "train", *args, "--out", "whole", allowed={0})[3]
    whole = srgan.load_checkpoint(folder / "whole/checkpoint_latest.pth")
    seen, out = Counter(), folder / "killed"
    latest, log, ended = out / "checkpoint_latest.pth", folder / "log", os.WEXITED | os.WNOWAIT
    while seen["killed"] < times or not seen["compared"] or out.exists():
        pid = launch(folder, "train", *args, "--out", out, *["--resume"] * latest.exists())
        while "to validate on" not in log.read_text() and \
                not os.waitid(os.P_PID, pid, ended | os.WNOHANG):
            time.sleep(0.01)
        if seen["killed"] < times:
            time.sleep(rng.uniform(0, 0.6))
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL), log.read_text()
        seen["killed"] += status < 0
        seen["killed inside a save"] += any(out.glob(".*"))
        state = srgan.load_checkpoint(latest) if latest.exists() else whole | {"step": 0}
        if state["step"] == whole["step"]:
            assert all(same(whole[key], state[key]) for key in ("generator", "training", "best"))
            assert not list(out.glob(".*")), "half-written files left"
            shutil.rmtree(out)
            seen["compared"] += 1
    return seen


def mutate(data, rng, suffix=""):
    """One of: bits flipped, the end cut off, a part doubled or zeroed, or a wrong size."""
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
    elif suffix == "png":                                        # with the right checksum
        data[16:24] = struct.pack(">II", *rng.choices((0, 1, 60, 1999, 60000, 2 ** 31), k=2))
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        for _ in range(8):                                       # sizes are near the beginning
            data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
    return bytes(data)


def fuzz(folder, times, rng):
    """Broken images among good ones: each is upscaled, or refused by name."""
    seen, broken, image = {}, folder / "broken", Image.fromarray(photo(60, 56))
    shutil.copytree(folder / "photos", broken)
    for i in range(times):
        suffix = SUFFIXES[i % len(SUFFIXES)]
        path = broken / f"{i:05d}.{suffix}"
        image.save(path, **{"compression": "tiff_lzw"} if suffix == "tiff" else {})
        path.write_bytes(mutate(path.read_bytes(), rng, suffix))
    count = len(list(broken.iterdir()))
    for script, status, args in (
            ("upscale", 1, ["broken", "large", "--ckpt", "tiny.pth", "--max-megapixels", "4"]),
            ("evaluate", 1, ["--ckpt", "tiny.pth", "--data", "broken", "--no-lpips"]),
            ("train", 0, [*TRAIN, "--stage", "srresnet", "--data", "broken", "--val", "photos"])):
        _, output, mb, fault = call(folder, script, *args, allowed={status}, seconds=100 + times)
        assert not fault, fault
        seen[f"{script}.py: MB at its peak"] = round(mb)
        if script == "upscale":
            refused = [line for line in output.splitlines() if line.startswith("broken/")]
            for line in refused:
                if "megapixels" in line:                         # the others have no such limit
                    (folder / line.partition(":")[0]).unlink()
    results = list((folder / "large").iterdir())
    for path in results:
        Image.open(path).load()
    assert len(results) + len(refused) == count, (len(results), len(refused))
    return {"upscaled": len(results), "refused": len(refused)} | seen


class Code:
    """An object whose unpickling calls a function."""

    def __reduce__(self):
        return os.mkdir, ("code-ran",)


def junk(old, rng):
    """Something to put in the place of `old`; for a tensor, mostly another of its shape."""
    nan, nested, x = float("nan"), [], torch.zeros(2, 3)
    for _ in range(60):                                          # 2^60 lists when printed
        nested = [nested, nested]
    if isinstance(old, torch.Tensor) and old.numel() < 2 ** 24 and rng.random() < 0.7:
        x = torch.full(old.shape, 0.5)
        return rng.choice((
            x.double(), x.flatten()[:-1], x[None], x.int(), x.bool(), x.cfloat(), -x, x * nan,
            x * 1e30, x.to_sparse(), x.clone().requires_grad_(), x.new_empty(0), x.to("meta"),
            x.new_zeros(()).expand(x.shape),
            x.new_zeros(x.numel() + 1).as_strided(x.shape, [0] * x.dim(), x.numel())))
    return rng.choice((
        None, True, -1, 0, 10 ** 30, 10 ** 600, -2 ** 63, 1e-300, nan, float("inf"), "", b"x",
        "x" * 10 ** 6, "\x1b[2J\n", [], {}, (), nested, [nested] * 3, {1: {}}, {(1, 2): 3}, [1] * 3,
        {"mean": nan, "std": 0.0, "epoch": 1}, torch.float32, torch.Size([2]), Code(), x, x.half(),
        x[0, 0], x * nan, x.to_sparse(), x[:1, :1].expand(2 ** 20, 2 ** 20), x.to("meta")))


def containers(tree):
    """All dictionaries and lists within `tree`, itself included, that are not empty."""
    if isinstance(tree, (dict, list)) and tree:
        yield tree
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from containers(value)


def saved(state):
    """The bytes of a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def with_junk(state, rng):
    """A checkpoint in which one to three entries, at any depth, are replaced or renamed."""
    for tree in rng.choices([*containers(state)], k=rng.randint(1, 3)):
        key = rng.choice([*tree] if isinstance(tree, dict) else range(len(tree)))
        if isinstance(tree, dict) and rng.random() < 0.1:
            tree[rng.choice((None, 10 ** 600, (1, 2), f"{key}x", "x" * 10 ** 6))] = tree.pop(key)
        else:
            tree[key] = junk(tree[key], rng)
    return saved(state)


HOSTILE = {  # kind: function of a checkpoint and a random.Random; test_checkpoints.py has others
    "code": lambda state, rng: saved({**state, rng.choice([*state]): Code()}),
    "a broken file": lambda state, rng: mutate(saved(state), rng),
    "no dictionary": lambda state, rng: saved(junk(0, rng)),
    "other entries": with_junk,
}


def hostile(folder, times, rng):
    """Each file is given as --ckpt and as --resume; those that do harm are kept beside `folder`."""
    seen, faults, most, path = Counter(), [], 0, folder / "hostile.pth"
    train = [*TRAIN, "--stage", "gan"]
    assert not call(folder, "train", *train, "--init", "tiny.pth", "--out", "base", allowed={0})[3]
    base = srgan.load_checkpoint(folder / "base/checkpoint_latest.pth")
    for i in range(times):
        kind = list(HOSTILE)[min(i % 10, 3)]
        path.write_bytes(HOSTILE[kind](copy.deepcopy(base), rng))
        for script, args in (("upscale", ["photos/0.png", "out.png", "--ckpt", path,
                                          "--precision", "fp32", "--overwrite"]),
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


def main():
    modes = {"kill": (kill, 50), "fuzz": (fuzz, 3000), "hostile": (hostile, 300)}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=modes)
    parser.add_argument("--times", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args, began = parser.parse_args(), time.monotonic()
    mode, times = modes[args.what]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "photos").mkdir()
        for i in range(3):
            Image.fromarray(photo(60, 72, i)).save(folder / f"photos/{i}.png")
        srgan.save_checkpoint(folder / "tiny.pth", srgan.Generator(channels=8, n_blocks=1))
        seen = mode(folder, args.times or times, random.Random(args.seed))
    print(f"{args.what}, {time.monotonic() - began:.0f} s: "
          + ", ".join(f"{what} {n}" for what, n in seen.items()))


if __name__ == "__main__":
    main()
