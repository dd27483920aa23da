#!/usr/bin/env bash
# Pillow 13.0.0: ImageOps.exif_transpose, the usual way to turn a photo upright, replaces every
# letter beyond ASCII in the photo's EXIF by "?". Saving as AVIF does so, too, even if the photo is
# upright already and its EXIF is handed over as bytes.
#
# Cameras and photo programs write names into Artist and Copyright in UTF-8. Pillow reads such texts
# as Latin-1 and, as soon as it has to change one number in the block, writes all of it anew, in
# ASCII with "?" for the rest. Nothing warns. What makes it hard to notice: a photo with orientation
# 1 keeps its texts in JPEG, PNG and WebP, so only photos in portrait format lose them.
#
# Seen with Pillow 13.0.0, for a copyright of "© José" in a JPEG:
#   orientation 1, exif_transpose:                    kept
#   orientation 6, exif_transpose:                    ?? Jos??
#   orientation 1, save(..., exif=bytes), JPEG:       kept
#   orientation 1, save(..., exif=bytes), AVIF:       ?? Jos??
# Exits 0 while this is so, and 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import io
import struct
import sys

from PIL import Image, ImageOps

NAME = "© José".encode()


def photo(orientation):
    """A JPEG whose EXIF, as a camera writes it, has an orientation and a copyright in UTF-8."""
    entries = struct.pack("<HHLHH", 274, 3, 1, orientation, 0)
    entries += struct.pack("<HHLL", 33432, 2, len(NAME) + 1, 8 + 2 + 24 + 4)
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entries + bytes(4) + NAME + b"\0"
    file = io.BytesIO()
    Image.new("RGB", (32, 16), "teal").save(file, "JPEG", exif=exif)
    return Image.open(file)


def saved(image, form):
    file = io.BytesIO()
    image.save(file, form, exif=image.info["exif"])
    return file.getvalue()


kept = {
    "orientation 1, exif_transpose": NAME in ImageOps.exif_transpose(photo(1)).info["exif"],
    "orientation 6, exif_transpose": NAME in ImageOps.exif_transpose(photo(6)).info["exif"],
    "orientation 1, saved as JPEG": NAME in saved(photo(1), "JPEG"),
    "orientation 1, saved as AVIF": NAME in saved(photo(1), "AVIF"),
}
for what, is_kept in kept.items():
    print(f"{what}: {'kept' if is_kept else 'replaced by ?'}")
sys.exit(list(kept.values()) != [True, False, True, False])
PYTHON
