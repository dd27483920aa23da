#!/usr/bin/env bash
# Pillow 13.0.0 opens an uncompressed 16-bit RGB TIFF that is stored plane by plane, and returns
# noise: no exception, no warning.
#
# Such files are valid TIFF (PlanarConfiguration = 2); Photoshop's "Per Channel" order, scanners and
# scientific programs write them. Pillow takes the 16-bit samples of each plane for 8-bit ones: low
# and high bytes alternate along each row, and the second half of each plane is never read.
# What makes it hard to notice: the same pixels open correctly in 8 bits plane by plane, in 16 bits
# pixel by pixel, and in 16 bits plane by plane once they are compressed. Only the simplest
# combination fails. tifffile, which wrote the files, reads all four.
#
# Seen with Pillow 13.0.0 and tifffile 2025.5.10 on a ramp (the largest error, of 255):
#   8 bits, plane by plane, uncompressed:      0
#   16 bits, pixel by pixel, uncompressed:     0
#   16 bits, plane by plane, deflate:          0
#   16 bits, plane by plane, uncompressed:   251
# Exits 0 while this is so, and 1 once Pillow reads the fourth file or refuses it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0 tifffile==2025.5.10 numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
import sys

import numpy as np
import tifffile
from PIL import Image

y, x = np.mgrid[:64, :96]
ramp = np.stack([2 * x, 3 * y, 255 - 2 * x], 2).astype(np.uint16)    # [64, 96, 3], 0 to 255
deep = 256 * ramp + np.random.default_rng(0).integers(0, 256, ramp.shape, np.uint16)


def error(bits, planar, compression):
    """The largest difference between what is written and what Pillow reads, in 8 bits."""
    pixels = ramp.astype(np.uint8) if bits == 8 else deep
    if planar:
        tifffile.imwrite("a.tif", pixels.transpose(2, 0, 1), photometric="rgb",
                         planarconfig="separate", compression=compression)
    else:
        tifffile.imwrite("a.tif", pixels, photometric="rgb", compression=compression)
    assert np.array_equal(tifffile.imread("a.tif"), pixels.transpose(2, 0, 1) if planar else pixels)
    read = np.asarray(Image.open("a.tif"), int)
    return np.abs(read - ramp).max()


right = [error(8, True, None), error(16, False, None), error(16, True, "zlib")]
wrong = error(16, True, None)
print("8 bits, plane by plane; 16 bits, pixel by pixel; 16 bits, plane by plane, deflate:", *right)
print("16 bits, plane by plane, uncompressed:", wrong)
sys.exit(not (max(right) <= 1 and wrong > 100))
PYTHON
