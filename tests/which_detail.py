"""Which details decide the result? A program, not a test:

    python tests/which_detail.py --data photos --test Set5 Set14 --out runs/details

It trains the base (stage 1, patches of 48x48, a cosine from 4e-4) and, one at a time, the base with
one choice undone, once for each seed. Each training runs in a
process of its own, which may replace parts of srgan by others: what is no setting of train.py
stands here. One line per training goes to results.csv in --out; what it holds is not trained again,
so that the program can be stopped and continued. At the end, or with --report, it prints a table:
the difference from the base of the same seed, as the mean over the seeds and half of their range.

docs/MEASURED.md shows the table.
"""
import argparse
import csv
import multiprocessing
import sys
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import srgan  # noqa: E402
import train  # noqa: E402

EXACT_DOWNSAMPLE = srgan.downsample


class SlopePerMap(nn.Module):
    """PReLU with one slope for each feature map, as in He et al. 2015."""

    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.full((n,), 0.25))

    def forward(self, x):                                        # [N, n, h, w], or 4 n maps if
        repeats = x.shape[1] // len(self.weight)                 # srgan computes before a shuffle
        return nn.functional.prelu(x, self.weight.repeat_interleave(repeats))


class OtherBlock(nn.Module):
    """A residual block of other layers than srgan.ResidualBlock's."""

    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.body(x)


class SlopesPerMapGenerator(srgan.Generator):
    """G with one slope for each feature map in every PReLU."""

    def __init__(self, scale=4, channels=64, n_blocks=16, tanh=True):
        super().__init__(scale, channels, n_blocks, tanh)
        self.head[1] = SlopePerMap(channels)
        for i, block in enumerate(self.blocks):
            block.body[2] = SlopePerMap(channels)
            self.blocks[i] = OtherBlock(*block.body)
        for i in range(2, len(self.upsample), 3):
            self.upsample[i] = SlopePerMap(channels)


class PlainGenerator(srgan.Generator):
    """G without batch norm. The convolutions have biases instead."""

    def __init__(self, scale=4, channels=64, n_blocks=16, tanh=True):
        super().__init__(scale, channels, n_blocks, tanh)
        n = channels
        for i in range(n_blocks):
            self.blocks[i] = OtherBlock(
                nn.Conv2d(n, n, 3, padding=1), nn.PReLU(), nn.Conv2d(n, n, 3, padding=1))
        self.fuse = nn.Sequential(nn.Conv2d(n, n, 3, padding=1))


class SmallTailGenerator(srgan.Generator):
    """G whose last convolution is 3x3 instead of 9x9."""

    def __init__(self, scale=4, channels=64, n_blocks=16, tanh=True):
        super().__init__(scale, channels, n_blocks, tanh)
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)


def pillow_downsample(hr, scale=4, kernel="bicubic"):
    """srgan.downsample by Pillow: horizontally first, the kernel cut at the image's border."""
    batch = []
    for image in hr:
        pixels = Image.fromarray(srgan.to_pixels(image * 2 - 1).numpy())
        size = pixels.width // scale, pixels.height // scale
        lr = pixels.resize(size, Image.Resampling.BICUBIC)
        batch.append(srgan.to_tensor(np.array(lr)))
    return torch.stack(batch)


BASE = ["--lr", "4e-4", "--set", "srresnet.schedule=cosine", "--set", "patch_size=48",
        "--set", "lpips=false", "--precision", "bf16"]
VARIANTS = {  # what is undone: (more arguments of train.py, what is replaced in srgan)
    "base": ([], None),
    "no Tanh": (["--set", "tanh=false"], None),
    "starts at random": (["--set", "init=torch"], None),
    "no moving average": (["--set", "ema=0"], None),
    "no flips or rotations": (["--set", "augment=none"], None),
    "a slope per map": ([], SlopesPerMapGenerator),
    "no batch norm": ([], PlainGenerator),
    "L1 instead of MSE": (["--set", "srresnet.pixel_loss=l1"], None),
    "3x3 last convolution": ([], SmallTailGenerator),
    "trained on Pillow's LR": ([], pillow_downsample),
    "fp32 instead of bf16": (["--precision", "fp32"], None),
}


def work(args, variant, seed, pipe):
    """In a process of its own: train one variant, measure it, and send its PSNRs."""
    more, replacement = VARIANTS[variant]
    if replacement is pillow_downsample:
        srgan.downsample = pillow_downsample
    elif replacement:
        srgan.GENERATORS["residual"] = replacement
    out = Path(args.out, f"{variant.replace(' ', '_')}_{seed}")
    sys.argv = ["train.py", "--stage", "srresnet", "--data"] + args.data
    sys.argv += ["--val", args.test[0], "--out", str(out), "--cache", args.cache]
    sys.argv += ["--epochs", "1", "--steps-per-epoch", str(args.updates), "--seed", str(seed)]
    sys.argv += BASE + ["--batch-size", str(args.batch_size)] + more
    train.main()
    generator = srgan.load_generator(out / "checkpoint_latest.pth")
    scores = []
    for downsample in (EXACT_DOWNSAMPLE, pillow_downsample):
        for folder in args.test:
            scores.append(mean_psnr(generator, folder, downsample))
    pipe.send(scores)


def mean_psnr(generator, folder, downsample):
    """Mean PSNR over the images of a folder, whose LR images `downsample` makes."""
    values = []
    for _, hr_path, _ in srgan.find_pairs(folder):
        _, hr = srgan.open_pair(hr_path)
        lr = downsample(srgan.to_tensor(hr)[None])
        lr = srgan.to_pixels(lr * 2 - 1)[0].numpy()
        values.append(srgan.psnr(srgan.upscale(generator, lr), hr))
    return mean(values)


def run_all(args, path):
    """Train what results.csv does not hold yet, and append a line for each training."""
    for seed in range(args.seeds):
        for variant in VARIANTS:
            if (variant, seed) in read(path):
                continue
            context = multiprocessing.get_context("spawn")
            parent, child = context.Pipe()
            process = context.Process(target=work, args=(args, variant, seed, child))
            process.start()
            child.close()
            try:
                scores = parent.recv()
            except EOFError:
                print(f"{variant}, seed {seed}: the training failed", flush=True)
                continue
            process.join()
            with open(path, "a", newline="") as file:
                csv.writer(file).writerow([variant, seed, *scores])
            print(variant, seed, scores, flush=True)


def read(path):
    """results.csv as {(variant, seed): PSNRs}."""
    results = {}
    if path.exists():
        with open(path, newline="") as file:
            for variant, seed, *scores in csv.reader(file):
                results[variant, int(seed)] = np.array(scores, float)
    return results


def report(args, path):
    """Print the table, over the seeds for which there are both the base and the variant."""
    results = read(path)
    columns = [Path(folder).name for folder in args.test]
    columns += [f"{name}, Pillow's LR" for name in columns]
    print("| | " + " | ".join(columns) + " | seeds |")
    for variant in VARIANTS:
        changes = []
        for seed in range(args.seeds):
            if (variant, seed) in results and ("base", seed) in results:
                change = results[variant, seed]
                if variant != "base":
                    change = change - results["base", seed]
                changes.append(change)
        if not changes:
            continue
        sign = "" if variant == "base" else "+"
        cells = []
        for values in np.transpose(changes):
            cell = f"{values.mean():{sign}.2f}"
            if len(values) > 1:
                cell += f" ± {(values.max() - values.min()) / 2:.2f}"
            cells.append(cell)
        print(f"| {variant} | " + " | ".join(cells) + f" | {len(changes)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="folders of photos to train on")
    parser.add_argument("--test", nargs="+", required=True, help="folders of HR images to measure")
    parser.add_argument("--out", default="runs/details", help="folder of the trainings")
    parser.add_argument("--cache", default="cache", help="folder of decoded images")
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only print the table")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    path = Path(args.out, "results.csv")
    if not args.report:
        run_all(args, path)
    report(args, path)


if __name__ == "__main__":
    srgan.run(main)
