"""Whether the tests would notice: applies one-line faults, one at a time, to a copy of the project.

    python tests/mutants.py [--only WORD] [--list]

For each fault the tests that are to notice it are run in the copy. Prints the faults that survive,
and exits with 1 where there are any. A program, not a test; it takes about 15 minutes.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
NETWORKS, UPDATE = "test_networks.py", "test_update.py"
PATCHES, METRICS, UPSCALING = "test_patches.py", "test_metrics.py", "test_upscaling.py"
IMAGES, CHECKPOINTS, SPEED = "test_images.py", "test_checkpoints.py", "test_speed.py"
TRAIN, SETTINGS, UPSCALE = "test_train.py", "test_settings.py", "test_upscale.py"
EVALUATE, README = "test_evaluate.py", "test_readme.py"

FAULTS = [  # (file, the code, the fault, the tests that are to notice)
    # Networks
    ("srgan.py", "return x + self.body(x)                                   # el",
     "return self.body(x)                                   # el", NETWORKS),
    ("srgan.py", "x = x + self.fuse(self.blocks(x))", "x = self.fuse(self.blocks(x))", NETWORKS),
    ("srgan.py", "nn.Tanh() if tanh else nn.Identity()", "nn.Tanh()", NETWORKS),
    ("srgan.py", "stride = 1 if i % 2 else 2", "stride = 2 if i % 2 else 1", NETWORKS),
    ("srgan.py", "nn.LeakyReLU(0.2)]                              # k3n64s1",
     "nn.LeakyReLU(0.01)]                              # k3n64s1", NETWORKS),
    ("srgan.py", "if i > 1 and j == 1:", "if i > 2 and j == 1:", NETWORKS),
    ("srgan.py", "x = ((x + 1) / 2 - self.mean) / self.std", "x = (x - self.mean) / self.std",
     NETWORKS),
    ("srgan.py", "return self.features(x) / self.divisor", "return self.features(x)", NETWORKS),
    ("srgan.py", "repeat_interleave(4, dim=0))", "repeat(4, *[1] * (p.dim() - 1)))", NETWORKS),
    ("srgan.py", "return x + 0.2 * self.body(x)", "return x + self.body(x)", NETWORKS),
    # Losses
    ("srgan.py", "return F.softplus(-D(sr)).mean()", "return -F.softplus(D(sr)).mean()", UPDATE),
    ("srgan.py", "return F.softplus(-real).mean() + F.softplus(fake).mean()",
     "return F.softplus(real).mean() + F.softplus(-fake).mean()", UPDATE),
    ("srgan.py", "return content + weight * adversarial", "return content + adversarial", UPDATE),
    ("srgan.py", "return (down.abs().sum() + right.abs().sum()) / len(sr)",
     "return down.abs().mean() + right.abs().mean()", UPDATE),
    ("srgan.py", "sr, hr: -D(sr).mean()", "sr, hr: D(sr).mean()", UPDATE),
    ("srgan.py", "fake, real: fake.mean() - real.mean()",
     "fake, real: real.mean() - fake.mean()", UPDATE),
    ("srgan.py", "        real = D(hr)\n", "        real = D(sr)\n", UPDATE),
    ("srgan.py", "real: discriminator_loss(fake - real.mean(), real - fake.mean())",
     "real: discriminator_loss(real - fake.mean(), fake - real.mean())", UPDATE),
    ("srgan.py", ".norm(dim=1) - 1).square().mean()", ".norm(dim=1)).square().mean()", UPDATE),
    ("srgan.py", "torch.lerp(hr, sr, mix)", "torch.lerp(hr, hr, mix)", UPDATE),
    ("srgan.py", "create_graph=True", "create_graph=False", UPDATE),
    # The update
    ("srgan.py", "loss = loss + weight * penalty(sr, hr)", "loss = loss + 0 * penalty(sr, hr)",
     UPDATE),
    ("srgan.py", "self.D.requires_grad_(False)", "self.D.requires_grad_(True)", UPDATE),
    ("srgan.py", "self.update_discriminator(sr.detach(), hr) | self.update_generator(sr, hr)",
     "self.update_generator(sr, hr) | self.update_discriminator(sr.detach(), hr)", UPDATE),
    ("srgan.py", "    adam.zero_grad()\n", "", UPDATE),
    ("srgan.py", "zip(earlier[::2], earlier[1::2])", "zip(earlier[:2:2], earlier[1:2:2])", UPDATE),
    # Data
    ("srgan.py", "lr = round_to_8_bits(lr)\n", "", IMAGES),
    ("srgan.py", "(0.4 * scale) ** 2", "(0.5 * scale) ** 2", IMAGES),
    ("srgan.py", "add(1).mul(127.5).round()", "add(1).mul(127.5)", IMAGES),
    ("srgan.py", "patch = patch.flip(0) if symmetry & 2 else patch\n", "", PATCHES),
    ("srgan.py", "corner * scale, self.window", "corner * scale + 1, self.window", PATCHES),
    ("srgan.py", "replace=not distinct", "replace=True", PATCHES),
    ("srgan.py", "(self.seed, self.rank, step", "(self.seed, 0, step", PATCHES),
    ("srgan.py", "F.pad(hr, [-MARGIN * self.scale] * 4) * 2 - 1",
     "F.pad(hr, [-MARGIN * self.scale] * 4)", PATCHES),
    ("srgan.py", "self.crop_margin * size / scale", "0 * size / scale", PATCHES),
    # Metrics
    ("srgan.py", "65.481 * r + 128.553 * g + 24.966 * b", "65.481 * b + 128.553 * g + 24.966 * r",
     METRICS),
    ("srgan.py", "(0.03 * 255) ** 2", "(0.3 * 255) ** 2", METRICS),
    ("srgan.py", "(2 * 1.5 ** 2)", "(2 * 2.5 ** 2)", METRICS),
    ("srgan.py", "[None].to(device) * 2 - 1 for image in", "[None].to(device) for image in",
     METRICS),
    # Upscaling
    ("srgan.py", "return before + enlarging, enlarging", "return before, enlarging", UPSCALING),
    ("srgan.py", "x[:, :, t0:b + radius, l0:r + radius]", "x[:, :, t0:b, l0:r]", UPSCALING),
    ("srgan.py", "return total / 8", "return total / 4", UPSCALING),
    ("srgan.py", "sr = torch.rot90(function(x), -turns, (2, 3))",
     "sr = torch.rot90(function(x), turns, (2, 3))", UPSCALING),
    # Checkpoints
    ("srgan.py", "average, current, 1 - decay", "average, current, decay",
     f"{CHECKPOINTS} {TRAIN}"),
    ("srgan.py", "weights_only=True)\n    except", "weights_only=False)\n    except",
     CHECKPOINTS),
    ("srgan.py", "if not saved.isfinite().all():", "if False:", f"{CHECKPOINTS} {TRAIN}"),
    ("srgan.py", "        os.replace(temporary, path)\n", "        shutil.copy(temporary, path)\n",
     f"{CHECKPOINTS} {TRAIN}"),
    # Beyond the paper
    ("srgan.py", "return error.abs().mean() + uneven.abs().mean()",
     "return error.abs().mean()", NETWORKS),
    ("srgan.py", 'norm="ortho").abs()', 'norm="ortho").real', NETWORKS),
    # Speed
    ("srgan.py", "x.clamp(max=0).mul_(gradient)", "x.clamp(min=0).mul_(gradient)", SPEED),
    ("srgan.py", "conv.bias.repeat_interleave(r * r)", "conv.bias.repeat(r * r)", SPEED),
    # train.py
    ("train.py", 'tuple(map(float, values["betas"]))', "(0.9, 0.999)", TRAIN),
    ("train.py", "min(decay, (1 + self.step)", "min(0.5, (1 + self.step)", TRAIN),
    ("train.py", "begin * d_steps, end * d_steps", "begin, begin + (end - begin) * d_steps", TRAIN),
    ("train.py", "            patches.resize(size)\n", "", TRAIN),
    ("train.py", "0.1 ** sum(step >=", "0.1 ** sum(step >", f"{TRAIN} {SETTINGS}"),
    ("train.py", "0.5 + 0.5 * math.cos", "0.5 + 0.4 * math.cos", f"{TRAIN} {SETTINGS}"),
    ("train.py", "(step + 1) / stage[\"warmup\"]", "step / stage[\"warmup\"]",
     f"{TRAIN} {SETTINGS}"),
    ("train.py", "if name not in best or sign *", "if name not in best or", TRAIN),
    ("train.py", "values.get(\"discriminator_lr\") or values[\"lr\"]", "values[\"lr\"]", TRAIN),
    ("train.py", "flat.div_(dist.get_world_size())", "flat", TRAIN),
    ("train.py", "module.eval()", "module.train()", TRAIN),
    ("train.py", "if int(row[\"update\"]) <= last", "", "test_safety.py"),
    # evaluate.py and upscale.py
    ("srgan.py", "np.std(values)", "np.var(values)", f"{METRICS} {EVALUATE}"),
    ("upscale.py", "1 - args.blend", "args.blend", UPSCALE),
]


def survives(file, code, fault, tests):
    """Whether the tests pass although the fault is there."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
            ".git", ".venv", "venv", "runs", "cache", "data", "__pycache__", ".pytest_cache"))
        text = (copy / file).read_text(encoding="utf-8")
        if text.count(code) != 1:
            raise SystemExit(f"{file} holds {code!r} {text.count(code)} times, not once")
        (copy / file).write_text(text.replace(code, fault), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
             *(f"tests/{name}" for name in tests.split())],
            cwd=copy, capture_output=True, text=True, timeout=1200,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
        return done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORD", default="", help="faults whose code holds WORD")
    parser.add_argument("--list", action="store_true", help="print the faults and exit")
    args = parser.parse_args()
    chosen = [fault for fault in FAULTS if args.only in f"{fault[0]} {fault[1]}"]
    survivors = []
    for file, code, fault, tests in chosen:
        line = f"{file}: {code.strip()!r} -> {fault.strip()!r}"
        if args.list:
            print(line)
        elif survives(file, code, fault, tests):
            survivors.append(line)
            print(f"SURVIVES  {line}", flush=True)
        else:
            print(f"noticed   {line}", flush=True)
    print(f"{len(chosen)} faults, {len(survivors)} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
