"""Would the tests notice? Applies one-line faults, one at a time, to a copy of the project.

    python tests/mutants.py [--only WORD] [--list]

For each fault, runs in the copy the tests that should notice it. Prints the faults that survive,
and exits with 1 if there are any. A program, not a test; it takes about 15 minutes.
"""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = {  # "file, tests that should notice": [(code, fault), ...]
    "srgan.py, networks": [
        ("return x + self.body(x)                                   # el",
         "return self.body(x)                                   # el"),
        ("x = x + self.fuse(self.blocks(x))", "x = self.fuse(self.blocks(x))"),
        ("nn.Tanh() if tanh else nn.Identity()", "nn.Tanh()"),
        ("stride = 1 if i % 2 else 2", "stride = 2 if i % 2 else 1"),
        ("nn.LeakyReLU(0.2)]                              # k3n64s1",
         "nn.LeakyReLU(0.01)]                              # k3n64s1"),
        ("if i > 1 and j == 1:", "if i > 2 and j == 1:"),
        ("x = ((x + 1) / 2 - self.mean) / self.std", "x = (x - self.mean) / self.std"),
        ("return self.features(x) / self.divisor", "return self.features(x)"),
        ("repeat_interleave(4, dim=0))", "repeat(4, *[1] * (p.dim() - 1)))"),
        ("return x + 0.2 * self.body(x)", "return x + self.body(x)"),
        ("return error.abs().mean() + uneven.abs().mean()", "return error.abs().mean()"),
        ('norm="ortho").abs()', 'norm="ortho").real')],
    "srgan.py, update": [
        ("return F.softplus(-D(sr)).mean()", "return -F.softplus(D(sr)).mean()"),
        ("return F.softplus(-real).mean() + F.softplus(fake).mean()",
         "return F.softplus(real).mean() + F.softplus(-fake).mean()"),
        ("return content + weight * adversarial", "return content + adversarial"),
        ("return (down.abs().sum() + right.abs().sum()) / len(sr)",
         "return down.abs().mean() + right.abs().mean()"),
        ("sr, hr: -D(sr).mean()", "sr, hr: D(sr).mean()"),
        ("fake, real: fake.mean() - real.mean()", "fake, real: real.mean() - fake.mean()"),
        ("        real = D(hr)\n", "        real = D(sr)\n"),
        ("real: discriminator_loss(fake - real.mean(), real - fake.mean())",
         "real: discriminator_loss(real - fake.mean(), fake - real.mean())"),
        (".norm(dim=1) - 1).square().mean()", ".norm(dim=1)).square().mean()"),
        ("torch.lerp(hr, sr, mix)", "torch.lerp(hr, hr, mix)"),
        ("create_graph=True", "create_graph=False"),
        ("loss = loss + weight * penalty(sr, hr)", "loss = loss + 0 * penalty(sr, hr)"),
        ("self.D.requires_grad_(False)", "self.D.requires_grad_(True)"),
        ("self.update_discriminator(sr.detach(), hr) | self.update_generator(sr, hr)",
         "self.update_generator(sr, hr) | self.update_discriminator(sr.detach(), hr)"),
        ("    adam.zero_grad()\n", ""),
        ("zip(earlier[::2], earlier[1::2])", "zip(earlier[:2:2], earlier[1:2:2])")],
    "srgan.py, images": [
        ("lr = round_to_8_bits(lr)\n", ""),
        ("taps, 0.4 * scale", "taps, 0.5 * scale"),
        ("add(1).mul(127.5).round()", "add(1).mul(127.5)")],
    "srgan.py, patches": [
        ("patch = patch.flip(0) if symmetry & 2 else patch\n", ""),
        ("corner * scale, self.window", "corner * scale + 1, self.window"),
        ("replace=not distinct", "replace=True"),
        ("(self.seed, self.rank, step", "(self.seed, 0, step"),
        ("F.pad(hr, [-MARGIN * self.scale] * 4) * 2 - 1", "F.pad(hr, [-MARGIN * self.scale] * 4)"),
        ("self.crop_margin * size / scale", "0 * size / scale")],
    "srgan.py, metrics": [
        ("65.481 * r + 128.553 * g + 24.966 * b", "65.481 * b + 128.553 * g + 24.966 * r"),
        ("(0.03 * 255) ** 2", "(0.3 * 255) ** 2"),
        ("sigma=1.5", "sigma=2.5"),
        ("[None].to(device) * 2 - 1 for image in", "[None].to(device) for image in")],
    "srgan.py, evaluate": [("np.std(values)", "np.var(values)")],
    "srgan.py, upscaling": [
        ("return before + enlarging, enlarging", "return before, enlarging"),
        ("x[:, :, t0:b + radius, l0:r + radius]", "x[:, :, t0:b, l0:r]"),
        ("return total / 8", "return total / 4"),
        ("sr = torch.rot90(function(x), -turns, (2, 3))",
         "sr = torch.rot90(function(x), turns, (2, 3))")],
    "srgan.py, checkpoints": [
        ("weights_only=True)\n    except", "weights_only=False)\n    except"),
        ("if not saved.isfinite().all():", "if False:"),
        ("        os.replace(temporary, path)\n", "        shutil.copy(temporary, path)\n")],
    "srgan.py, speed": [
        ("x.clamp(max=0).mul_(gradient)", "x.clamp(min=0).mul_(gradient)"),
        ("conv.bias.repeat_interleave(r * r)", "conv.bias.repeat(r * r)")],
    "srgan.py, train": [("average, current, 1 - decay", "average, current, decay")],
    "train.py, train": [
        ('tuple(map(float, values["betas"]))', "(0.9, 0.999)"),
        ("min(decay, (1 + self.step)", "min(0.5, (1 + self.step)"),
        ("begin * d_steps, end * d_steps", "begin, begin + (end - begin) * d_steps"),
        ("            patches.resize(size)\n", ""),
        ("0.1 ** sum(step >=", "0.1 ** sum(step >"),
        ("0.5 + 0.5 * math.cos", "0.5 + 0.4 * math.cos"),
        ("(step + 1) / stage[\"warmup\"]", "step / stage[\"warmup\"]"),
        ("if name not in best or sign *", "if name not in best or"),
        ("values.get(\"discriminator_lr\") or values[\"lr\"]", "values[\"lr\"]"),
        ("flat.div_(dist.get_world_size())", "flat"),
        ("module.eval()", "module.train()")],
    "train.py, safety": [("if int(row[\"update\"]) <= last", "")],
    "upscale.py, upscale": [("1 - args.blend", "args.blend")],
}


def survives(file, tests, code, fault):
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
            [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider",
             f"tests/test_{tests}.py"], cwd=copy, capture_output=True, text=True, timeout=1200,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
        return done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="WORD", default="", help="faults whose code holds WORD")
    parser.add_argument("--list", action="store_true", help="print the faults and exit")
    args = parser.parse_args()
    chosen = [(*where.split(", "), *fault) for where, faults in FAULTS.items() for fault in faults
              if args.only in f"{where} {fault[0]}"]
    survivors = 0
    for file, tests, code, fault in chosen:
        survived = not args.list and survives(file, tests, code, fault)
        survivors += survived
        verdict = "" if args.list else "SURVIVES  " if survived else "noticed   "
        print(f"{verdict}{file}: {code.strip()!r} -> {fault.strip()!r}", flush=True)
    print(f"{len(chosen)} faults, {survivors} survive")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
