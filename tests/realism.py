"""How real SR images look, as two distances from the originals (0: the same). A program, no test:

    python tests/realism.py results/weights_srgan Set14/HR [--feature-weights squeezenet1_1.pth]

Perceptual distance: Zhang et al. 2018, arXiv:1801.03924, with SqueezeNet 1.1 and without the
learned weights that make it LPIPS. A network that was trained on SqueezeNet's features is judged by
its own teacher here. Texture distance: the sliced Wasserstein distance (x1000) of 7x7 patches of
three levels of a Laplacian pyramid, Karras et al. 2018, arXiv:1710.10196, Sec. 5.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import srgan  # noqa: E402

TAPS = (1, 4, 7, 9, 10, 11, 12)                                  # of SqueezeNet's layers
SIDE, PATCHES, DIRECTIONS, LEVELS = 7, 1024, 256, 3


def perceptual_distance(phi, sr, hr):
    """Squared distance of the features, normalised at each position: mean over the positions."""
    x, total = (torch.stack([sr, hr]) - phi.mean) / phi.std, 0
    for i, layer in enumerate(phi.features):
        x = layer(x)
        if i in TAPS:
            a, b = x / (x.norm(dim=1, keepdim=True) + 1e-10)
            total += (a - b).square().sum(0).mean().item()
    return total


def bands(image):
    """The LEVELS finest levels of the Laplacian pyramid of an image [3, H, W], finest first."""
    gauss = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    for _ in range(LEVELS):
        low = F.pad(image[:, None], (2, 2, 2, 2), "reflect")
        low = F.conv2d(F.conv2d(low, gauss.view(1, 1, 5, 1)), gauss.view(1, 1, 1, 5))
        yield image - low[:, 0]
        image = low[:, 0, ::2, ::2]


def patches(images):
    """For each level [images x PATCHES, SIDE x SIDE, 3]; the images' sizes alone decide where."""
    rng, levels = np.random.default_rng(0), [[] for _ in range(LEVELS)]
    for image in images:
        for level, band in zip(levels, bands(image)):
            ys, xs = (rng.integers(0, side - SIDE + 1, PATCHES) for side in band.shape[1:])
            level += [band[:, y:y + SIDE, x:x + SIDE].permute(1, 2, 0).reshape(-1, 3).numpy()
                      for y, x in zip(ys, xs)]
    return [np.stack(level) for level in levels]


def sliced_wasserstein(a, b):
    """Mean distance of two sets of patches in b's normalised colours, sorted along directions."""
    mean, std = b.mean((0, 1)), b.std((0, 1))
    a, b = (((x - mean) / std).reshape(len(x), -1) for x in (a, b))
    rng = np.random.default_rng(1)
    directions = rng.standard_normal((a.shape[1], DIRECTIONS)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=0)
    return 1000 * np.abs(np.sort(a @ directions, 0) - np.sort(b @ directions, 0)).mean()


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("sr", help="folder of SR images, named like the originals")
    parser.add_argument("hr", help="folder of the originals")
    parser.add_argument("--feature-weights", default="imagenet", metavar="FILE")
    args = parser.parse_args()
    pairs = [[srgan.to_tensor(srgan.open_rgb(path)) for path in (sr, hr)]
             for _, hr, sr in srgan.find_pairs(args.hr, args.sr)]
    phi = srgan.TruncatedSqueezeNet(str(TAPS[-1]), args.feature_weights)
    perceptual = np.mean([perceptual_distance(phi, *pair) for pair in pairs])
    texture = np.mean([sliced_wasserstein(*level) for level in zip(*map(patches, zip(*pairs)))])
    print(f"{args.sr}: {len(pairs)} images, perceptual distance {perceptual:.3f}, "
          f"texture distance {texture:.1f}")


if __name__ == "__main__":
    srgan.run(main)
