"""Draw the comparisons in figures/ from the images in figures/HR, with the bundled weights.

    python tests/figures.py
"""
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import srgan  # noqa: E402

generators = {title: srgan.load_generator(ROOT / f"weights/{title.lower()}.pth")
              for title in ("SRResNet", "SRGAN")}
for name, path, _ in srgan.find_pairs(ROOT / "figures"):
    lr, hr = srgan.open_pair(path)
    images = {"nearest neighbour": srgan.interpolate(lr, method=Image.Resampling.NEAREST),
              "bicubic": srgan.interpolate(lr)}
    images |= {title: srgan.upscale(g, lr) for title, g in generators.items()}
    images["original"] = hr
    srgan.side_by_side([*images.values()], [*images]).save(ROOT / f"figures/{name}.png")
