"""Faults that a run, a batch or a checkpoint may meet, in numbers. A program, not a test; the suite holds short forms of it:

    python tests/faults.py kill [--times 50]     SIGKILL at random moments of a training, then --resume, each time
    python tests/faults.py fuzz [--files 2400]   broken pictures through upscale.py, evaluate.py and train.py

Prints what was tried and what happened; exit status 1 where anything went wrong.
"""
import argparse
import io
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import srgan  # noqa: E402
from conftest import TINY, photo, same  # noqa: E402

SAVE = {"png": {}, "jpg": {"quality": 90}, "webp": {"quality": 80}, "tif": {"compression": "tiff_lzw"}, "gif": {}}


def training(folder, out, *more):
    return [sys.executable, ROOT / "train.py", "--data", folder / "photos", "--val", folder / "photos", "--cache", folder / "cache", "--stage", "srresnet",
            *TINY, "--epochs", "20", "--steps-per-epoch", "4", "--out", folder / out, "--device", "cpu", "--set", "checkpoint_every=5", *more]


def kill(folder, times, seed=0):
    """Kill a run at `times` random moments and go on each time; {what happened: how often}. The result must be the undisturbed one."""
    rng, seen = random.Random(seed), {"killed": 0, "inside a save": 0, "finished early": 0}
    (folder / "photos").mkdir()
    for i in range(3):
        Image.fromarray(photo(100, 120, i)).save(folder / "photos" / f"{i}.png")
    subprocess.run(training(folder, "whole"), check=True, capture_output=True)
    latest, target = folder / "killed/checkpoint_latest.pth", srgan.load_checkpoint(folder / "whole/checkpoint_latest.pth")
    command = training(folder, "killed")
    while seen["killed"] < times:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        beginning = b""
        while b"to validate on" not in beginning and (line := process.stdout.readline()):
            beginning += line
        time.sleep(rng.uniform(0, 0.6))
        deadline = time.monotonic() + 2 * (seen["killed"] % 2)  # every other time, wait for a file that is being written
        while time.monotonic() < deadline and process.poll() is None:
            if any(entry.name.startswith(".") and entry.name != ".lock" for entry in os.scandir(folder / "killed")):
                break
        process.send_signal(signal.SIGKILL)
        rest, status = process.stdout.read(), process.wait()
        if status == -signal.SIGKILL:
            seen["killed"] += 1
            seen["inside a save"] += any(folder.glob("killed/.[0-9]*.[0-9]*.*"))
        else:
            assert status == 0, (beginning + rest).decode()
            seen["finished early"] += 1
        if latest.exists() and srgan.load_checkpoint(latest)["step"] == 80:  # done: begin again, to kill that, too
            shutil.rmtree(folder / "killed")
        command = training(folder, "killed", *["--resume"] * latest.exists())
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = srgan.load_checkpoint(latest)
    assert result["step"] == 80 and all(same(result[key], target[key]) for key in ("generator", "training", "best")), "other weights"
    assert not list(folder.glob("killed/.[0-9]*.[0-9]*.*")), "half-written files left"
    return seen


def mutate(data, rng, suffix):
    """One of: bits flipped, cut off, a part doubled or zeroed, or, in PNG, a size that lies with its checksum right."""
    data, kind = bytearray(data), rng.randrange(5)
    if kind == 0:
        for _ in range(rng.choice((1, 3, 10, 100))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[rng.randrange(len(data)):]
    elif kind == 2:
        a = rng.randrange(len(data))
        data[a:a] = data[a:a + rng.randrange(1, 500)]
    elif kind == 3:
        a = rng.randrange(len(data))
        data[a:a + 64] = bytes(len(data[a:a + 64]))
    elif suffix == "png":
        data[16:24] = struct.pack(">II", rng.choice((0, 1, 70, 5000, 60000, 2 ** 31)), rng.choice((0, 1, 50, 5000, 60000, 2 ** 31)))
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        for _ in range(8):  # sizes stand near the beginning
            data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
    return bytes(data)


def make_mutants(folder, count, seed=0):
    rng, originals = random.Random(seed), {}
    for suffix, options in SAVE.items():
        stream = io.BytesIO()
        Image.fromarray(photo(40, 56)).save(stream, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()), **options)
        originals[suffix] = stream.getvalue()
    folder.mkdir(parents=True)
    for i in range(count):
        suffix = list(SAVE)[i % len(SAVE)]
        (folder / f"{i:05d}.{suffix}").write_bytes(mutate(originals[suffix], rng, suffix))


def fuzz(folder, count, seed=0, memory=8 * 2 ** 30):
    """The three scripts on `count` broken pictures; {what was seen: how often}."""
    pictures, seen = folder / "broken", {}
    make_mutants(pictures, count, seed)
    torch.manual_seed(0)
    ckpt = folder / "tiny.pth"
    srgan.save_checkpoint(ckpt, srgan.Generator(channels=4, n_blocks=1))
    slowest = 0
    for path in sorted(pictures.iterdir()):
        began = time.monotonic()
        try:
            srgan.open_image(path)
            outcome = "read"
        except srgan.InputError as error:
            assert "\n" not in str(error) and path.name in str(error)
            outcome = "refused"
        slowest = max(slowest, time.monotonic() - began)
        seen[f"{path.suffix[1:]} {outcome}"] = seen.get(f"{path.suffix[1:]} {outcome}", 0) + 1
    good = sum(n for what, n in seen.items() if what.endswith("read"))
    seen["slowest seconds"] = round(slowest, 2)
    assert slowest < 10

    def script(name, *args):
        began = time.monotonic()
        done = subprocess.run([sys.executable, ROOT / f"{name}.py", *args], capture_output=True, text=True, errors="replace", timeout=10 * count,
                              env={**os.environ, "OMP_NUM_THREADS": "2"}, cwd=folder,
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (memory, memory)))
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        seen[f"{name}.py seconds"] = round(time.monotonic() - began, 1)
        return done
    done = script("upscale", pictures, folder / "large", "--ckpt", ckpt)
    results = list((folder / "large").rglob("*"))
    too_large = done.stderr.count("out of memory") + done.stderr.count("cannot be written")  # a GIF may claim 79 megapixels
    seen["too large for the memory allowed"] = too_large
    assert done.returncode == 1 and len(results) + too_large == good and not [p for p in results if p.name.startswith(".")], (done.returncode, len(results), good)
    for path in results:
        Image.open(path).load()
    assert sum(".png: " in line or any(f".{s}: " in line for s in SAVE) for line in done.stderr.splitlines()) >= count - good
    done = script("evaluate", "--ckpt", ckpt, "--data", pictures, "--no-lpips")
    assert done.returncode == 1, done.stderr[-2000:]
    Image.fromarray(photo(100, 100)).save(pictures / "good.png")
    done = script("train", "--data", pictures, "--val", pictures / "good.png", "--stage", "srresnet", *TINY, "--set", "patch_size=16",
                  "--epochs", "1", "--steps-per-epoch", "5")
    assert done.returncode == 0 and "left out" in done.stderr, done.stderr[-2000:]
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "fuzz"))
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--files", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        seen = kill(Path(folder), args.times, args.seed) if args.what == "kill" else fuzz(Path(folder), args.files, args.seed)
    print(f"{args.what}, {time.monotonic() - began:.0f} s: " + ", ".join(f"{what} {n}" for what, n in seen.items()))


if __name__ == "__main__":
    main()
