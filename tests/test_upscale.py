"""upscale.py: what is read, kept, written and said."""
import errno
import functools
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, photo
from PIL import Image, ImageCms, PngImagePlugin

import srgan
import upscale

RGB = Image.fromarray(photo(20, 30))
UPRIGHT = 0x0112                                                 # EXIF: orientation


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    """A nearest-neighbour generator. Pillow's limit, which upscale.py sets, is restored."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    (tmp_path / "model").mkdir()
    generator = srgan.Generator(channels=4, n_blocks=1)
    srgan.INITS["nearest"](generator)
    srgan.save_checkpoint(tmp_path / "model/tiny.pth", generator)
    return tmp_path / "model/tiny.pth"


@pytest.fixture
def up(script, ckpt):
    """up(inputs ..., output, options ...) runs upscale.py: (exit status, stdout, stderr)."""
    return functools.partial(script, "upscale", "--ckpt", ckpt, "--precision", "fp32")


@pytest.fixture
def result(up, tmp_path):
    """result(image, name, output, options ...) saves an image as `name` and upscales it."""
    def call(image, name, out="out.png", *options, **save):
        image.save(tmp_path / name, **save)
        status, _, err = up(name, out, *options, "--overwrite")
        assert status == 0, err
        return Image.open(tmp_path / out)
    return call


def save_in(*names):
    """Save RGB under each name in the folder "in"; the tests run in tmp_path."""
    for name in names:
        path = Path("in", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        RGB.save(path)


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.*"))


def needs(out):
    """Skip a test where this version of Pillow cannot write the format."""
    if srgan.readable_formats().get(Path(out).suffix) not in Image.SAVE:
        pytest.skip("this version of Pillow does not write it")


def near(a, b):
    """Whether the images are alike."""
    a, b = (np.asarray(x.resize(b.size).convert("RGB"), float).ravel() for x in (a, b))
    return np.corrcoef(a, b)[0, 1] > 0.95


def test_every_kind_of_image_keeps_its_mode(result):
    grey, alpha = RGB.convert("L"), Image.linear_gradient("L").resize(RGB.size)
    images = {"L": grey, "RGB": RGB.quantize(64), "RGBA": RGB.copy(), "LA": grey.copy()}
    for mode, image in images.items():
        if "A" in mode:
            image.putalpha(alpha)
        large = result(image, "a.png")
        assert large.mode == mode and large.size == (120, 80)
        assert near(large, grey if "L" in mode else RGB), mode
        assert "A" not in mode or near(large.getchannel("A"), alpha)
    image.putalpha(77)                                           # G would leave traces in it
    assert result(image, "a.png").getchannel("A").getextrema() == (77, 77)


OUTPUTS = ["out.png", "out.jpg", "out.webp", "out.tif", "out.avif"]


def camera_exif(orientation=6):
    """EXIF as a camera writes it: a text beyond ASCII, date, position, maker's notes."""
    exif = Image.Exif()
    exif[UPRIGHT], exif[271], exif[33432] = orientation, "Maker", "\u00a9 2024 Jos\u00e9".encode()
    exif[0x8769] = {36867: "2023:01:02 03:04:05", 37500: b"notes" * 9, 40962: 30}
    exif[0x8825] = {1: "N", 2: (52.0, 30.0, 12.5)}
    return exif.tobytes()


@pytest.mark.parametrize("out", OUTPUTS)
def test_icc_profile_dpi_and_exif_are_kept_and_orientation_is_applied(result, out):
    """upscale.save_options, srgan.upright and srgan.exif_to_rewrite."""
    needs(out)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    large = result(RGB, "a.jpg", out, icc_profile=profile, dpi=(300, 300), exif=camera_exif())
    kept = large.getexif()
    assert kept.get(UPRIGHT, 1) == 1 and near(large, RGB.rotate(-90, expand=True))
    assert kept[271] == "Maker"
    assert kept[33432].encode("latin-1").decode() == "\u00a9 2024 Jos\u00e9"
    assert kept.get_ifd(0x8769)[36867] == "2023:01:02 03:04:05"
    assert kept.get_ifd(0x8825)[2] == (52.0, 30.0, 12.5)
    assert large.info["icc_profile"] == profile
    if out not in ("out.webp", "out.avif"):
        assert large.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    if out == "out.jpg":                                         # quality 95, 4:4:4
        assert max(large.quantization[0]) <= 12
        assert large.layer[0][1:3] == large.layer[1][1:3] == (1, 1)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("out", ["out.png", "out.jpg", "out.webp"])
def test_exif_keeps_every_byte_but_the_orientation(result, out, order):
    """srgan.upright."""
    turned, straight = Image.Exif(), Image.Exif()
    for exif, orientation in ((turned, 8), (straight, 1)):
        exif.load(camera_exif(orientation))
        exif.endian = order
    large = result(RGB, "a.webp", out, exif=turned.tobytes())
    assert large.info["exif"].removeprefix(b"Exif\0\0") == straight.tobytes()[6:]


def test_a_tiff_hands_on_its_exif_too(result):
    """srgan.exif_to_rewrite."""
    exif = Image.Exif()
    exif.load(camera_exif())
    kept = result(RGB, "a.tif", "out.jpg", exif=exif).getexif()
    assert kept.get_ifd(0x8769)[36867] == "2023:01:02 03:04:05" and 256 not in kept
    result(RGB, "a.tif", "out.tif", tiffinfo={33432: "Jos\u00e9".encode()})
    assert "Jos\u00e9".encode() in Path("out.tif").read_bytes()


@pytest.mark.parametrize("out", OUTPUTS)
def test_xmp_and_the_texts_of_a_png_are_kept(result, out):
    """upscale.save_options."""
    needs(out)
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6">Jos\u00e9</x:xmpmeta>'
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", xmp)
    texts.add_text("parameters", "a raccoon, \u5199\u771f")
    large = result(RGB, "a.png", out, pnginfo=texts, exif=camera_exif())
    assert large.info["xmp"] == xmp.replace('tiff:Orientation="6"', "").encode()
    if out == "out.png":
        assert large.text["parameters"] == "a raccoon, \u5199\u771f"


def test_a_png_with_megabytes_of_text_or_profile_is_read(result):
    """srgan.run, which raises Pillow's limit."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "node " * 600_000, zip=True)
    large = result(RGB, "a.png", "out.png", pnginfo=texts, icc_profile=bytes(3_000_000))
    assert large.size == (120, 80) and len(large.info["icc_profile"]) == 3_000_000


def wide_gamut():
    """An ICC profile with other primaries and a gamma of 1, and what it makes of RGB in sRGB."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = (profile.index(name, 128) for name in (b"rXYZ", b"gXYZ"))
    profile[red + 4:red + 12], profile[green + 4:green + 12] = (
        profile[green + 4:green + 12], profile[red + 4:red + 12])    # red is green and vice versa
    return bytes(profile)


@pytest.mark.parametrize("out", ["out.bmp", "out.ppm"])
def test_colours_become_srgb_where_no_profile_can_be_stored(result, out):
    """upscale.decode and srgan.to_srgb."""
    red, green, blue = RGB.split()
    large = result(Image.merge("RGB", (green, red, blue)), "a.png", out, icc_profile=wide_gamut())
    expected = result(RGB, "a.png", "expected.png")
    assert np.abs(np.subtract(large, expected, dtype=int)).max() <= 6
    grey = result(RGB.convert("L"), "a.png", out, icc_profile=grey_profile())
    assert grey.mode == "L" and near(grey, RGB.convert("L").point(TO_SRGB))


def grey_profile():
    """An ICC profile of grey with a gamma of 1."""
    xyz = struct.pack(">3l", 63190, 65536, 54061)                # D50
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">L", 1) + bytes(79),
            b"wtpt": b"XYZ " + bytes(4) + xyz, b"kTRC": b"curv" + bytes(8),
            b"cprt": b"text" + bytes(8)}
    table, body = struct.pack(">L", len(tags)), b""
    for name, data in tags.items():
        table += struct.pack(">4sLL", name, 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">L4sL4s4s4s", 132 + 12 * len(tags) + len(body), b"", 0x02400000, b"mntr",
                       b"GRAY", b"XYZ ") + bytes(12) + b"acsp" + bytes(28) + xyz + bytes(48)
    return head + table + body


TO_SRGB = [round(255 * (1.055 * (i / 255) ** (1 / 2.4) - 0.055)) if i else 0 for i in range(256)]


@pytest.mark.parametrize("out", ["out.webp", "out.avif", "out.png"])
def test_a_profile_for_grey_is_applied_where_grey_is_stored_as_rgb(result, out):
    """upscale.decode."""
    needs(out)
    large = result(RGB.convert("L"), "a.png", out, icc_profile=grey_profile())
    if out == "out.png":
        assert large.mode == "L" and large.info["icc_profile"] == grey_profile()
    else:
        assert "icc_profile" not in large.info
        expected = result(RGB.convert("L").point(TO_SRGB), "a.png", out)
        assert np.abs(np.subtract(large, expected, dtype=int)).max() <= 8


def test_no_dark_rim_appears_where_transparent_pixels_are_black(result):
    """upscale.fill_hidden, whose colours G sees."""
    y, x = np.mgrid[:60, :60]
    inside = (y - 30) ** 2 + (x - 30) ** 2 < 20 ** 2
    disc = np.where(inside[..., None], [255, 160, 32, 255], 0).astype(np.uint8)
    large = np.asarray(result(Image.fromarray(disc), "a.png"), int)
    visible = large[..., 3] > 0
    flat = np.asarray(result(Image.new("RGB", (9, 9), (255, 160, 32)), "a.png"), int)
    assert np.abs(large[visible][:, :3] - flat[18, 18]).max() <= 4
    assert large[0, 0, 3] == 0


def test_hidden_colours_come_from_nearby_and_visible_ones_stay():
    """upscale.fill_hidden."""
    colours = photo(33, 47)
    alpha = np.zeros((33, 47), np.uint8)
    alpha[:, :5], alpha[:, 40:] = 1, 255
    colours[:, :5], colours[:, 40:] = (200, 100, 0), (0, 0, 250)
    filled = np.asarray(upscale.fill_hidden(Image.fromarray(colours), Image.fromarray(alpha)), int)
    assert np.array_equal(filled[alpha > 0], colours[alpha > 0])
    assert np.abs(filled[:, 5:8] - [200, 100, 0]).max() <= 4
    assert np.abs(filled[:, 32:40] - [0, 0, 250]).max() <= 4
    same = upscale.fill_hidden(Image.fromarray(colours), Image.new("L", (47, 33)))
    assert np.array_equal(same, colours)                         # all hidden: nothing to take


def test_files_are_compressed_and_lossless_ones_stay_lossless(result):
    """upscale.save_options."""
    assert result(Image.new("L", (300, 200)), "a.png", "out.tif").info["compression"] != "raw"
    assert Path("out.tif").stat().st_size < 20_000
    exact = np.asarray(result(RGB, "a.png", "out.png"))
    lossless = result(RGB, "a.webp", "out.webp", lossless=True, icc_profile=bytes(5000))
    assert np.array_equal(lossless, exact)
    assert not np.array_equal(result(RGB, "a.webp", "out.webp", quality=100), exact)


def test_tiles_ensemble_precision_and_the_final_size_are_options(result, ckpt):
    generator = srgan.load_generator(ckpt)
    torch.nn.init.normal_(generator.tail.weight, std=0.2)
    srgan.save_checkpoint(ckpt, generator)
    plain = np.asarray(result(RGB, "a.png"), int)
    for options, least, most in ((("--tile", "7"), 0, 0.01), (("--tile", "0"), 0, 0.01),
                                 (("--ensemble",), 1, 30), (("--precision", "bf16"), 0.02, 30)):
        assert least <= np.abs(plain - result(RGB, "a.png", "out.png", *options)).mean() <= most
    assert result(RGB, "a.png", "out.png", "--outscale", "1.5").size == (45, 30)


def test_nothing_that_exists_is_overwritten_unasked(up):
    save_in("a.png", "b.png", "c.png", "../a.png", "../b.png", "../out/b.png")
    for args in (("a.png", "b.png"), ("a.png", "b.png", "b.png")):    # upscale.py *.png
        status, _, err = up(*args)
        assert status == 2 and "ends in /" in err and Image.open("b.png").size == (30, 20)
    assert up("a.png", "b.png", "--overwrite")[0] == 0 and Image.open("b.png").size == (120, 80)
    for done, said in (("1 of 3 exist", "out: 2 of 2 images, "), ("3 of 3", "out: nothing to do")):
        status, out, err = up("in", "out")                       # an interrupted folder
        assert status == 0 and done in err and out.startswith(said)
        assert Image.open("out/b.png").size == (30, 20)
    assert up("in", "out", "--overwrite")[0] == 0 and Image.open("out/b.png").size == (120, 80)


def test_inputs_are_never_overwritten(up):
    save_in("a.png")
    Path("link.png").symlink_to("in/a.png"), Path("hard.png").hardlink_to("in/a.png")
    for args in (("in/a.png", "in/a.png"), ("in/a.png", "in/"), ("in/a.png", "link.png"),
                 ("in/a.png", "hard.png"), ("link.png", "in/a.png"), ("in", "in"), ("in", ".")):
        for options in ((), ("--overwrite",)):
            status, _, err = up(*args, *options)
            assert status == 2 and ("never overwritten" in err or "holds the input" in err), args
    for options in ((), ("--overwrite",)):                       # a folder within the input
        assert up("in", "in/large", *options)[0] == 0
        assert written("in") == ["a.png", "large/a.png"]
    assert Image.open("in/a.png").size == (30, 20)


def test_a_folder_becomes_a_folder_in_the_formats_that_ext_names(up):
    save_in("a.jpg", "deep/b.webp", "c.PNG", "d.bmp", "e.gif", "f.tif", "f.png", "../a.jpg",
            "not-utf8-\udcff 写真.png")
    assert up("in", "out")[0] == 0                               # f.tif and f.png keep both
    assert written("out") == ["a.jpg", "c.PNG", "d.png", "deep/b.webp", "e.png", "f.png", "f.tif",
                              "not-utf8-\udcff 写真.png"]
    assert Image.open("out/deep/b.webp").format == "WEBP"
    assert up("in/f.tif", "in/f.png", "in/deep", "png/", "--ext", "png")[0] == 0
    assert written("png") == ["b.png", "f.png.png", "f.tif.png"]
    assert up("in/a.jpg", "one/")[0] == 0 and written("one") == ["a.jpg"]
    assert up("in/a.jpg", "one.png", "--ext", "jpg")[0] == 2     # it would be ignored
    assert "would both become" in up("a.jpg", "in/a.jpg", "other")[2]


def test_failures_are_listed_other_files_counted_and_the_other_images_done(up):
    """upscale_all and srgan.find_images."""
    save_in("a.png", "d.png", "e.png")
    Path("out/d.png").mkdir(parents=True)                        # in the way
    for name in ("b.png", "c.png", "raw.cr2", "scan.pdf", "notes.txt", "._.pdf"):
        Path("in", name).write_text("hello")
    status, out, err = up("in", "out", "--overwrite")
    assert status == 1 and out.startswith("out: 2 of 5 images") and len(err.splitlines()) == 5, err
    assert all(f"{name}.png: cannot be" in err for name in ("in/b", "in/c", "out/d"))
    assert "in: skipped 3 files" in err
    assert written("out") == ["a.png", "d.png", "e.png"]
    assert up("in/c.png", "in/b.png", "other")[0] == 2           # none was done


def test_what_is_left_behind_is_one_line(up):
    """upscale.main."""
    for name in ("in/a.gif", "in/b.gif", "in/c.gif"):
        save_in(Path(name).name)
        RGB.save(name, save_all=True, append_images=[RGB.rotate(90)] * (name != "in/c.gif"))
    err = up("in", "out")[2]
    assert err.count("only its first picture is kept") == 1 and ".gif and 1 more: only" in err


def test_names_that_differ_in_case_collide_where_the_disk_says_so(up, monkeypatch):
    """upscale.plan_folder and upscale.ignores_case."""
    save_in("IMG_1.jpg", "img_1.png")
    assert up("in", "out", "--ext", "png")[0] == 0
    assert len(written("out")) == 2
    monkeypatch.setattr(upscale, "ignores_case", lambda folder: True)
    assert up("in", "fat", "--ext", "png")[0] == 0
    assert written("fat") == ["IMG_1.jpg.png", "img_1.png.png"]
    save_in("deep/IMG_1.png", "deep/sub/x.png")
    assert "would both become" in up("in/img_1.png", "in/deep/IMG_1.png", "both/")[2]
    for output in ("in/IMG_1.PNG", "IN/"):
        assert "never overwritten" in up("in/img_1.png", output, "--overwrite")[2]


def test_whether_a_disk_ignores_case_is_asked_in_the_folder_or_above_it(tmp_path, monkeypatch):
    """upscale.ignores_case."""
    assert not upscale.ignores_case(tmp_path / "new/folder")
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: any(
        name.name.upper() == path.name.upper() for name in path.parent.iterdir()) or real(path))
    assert upscale.ignores_case(tmp_path / "new/folder")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_cannot_be_written_is_noticed_before_the_work(up, monkeypatch):
    """upscale.ignores_case, which writes a temporary file."""
    save_in("a.png")

    def fail(**options):
        raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(upscale.tempfile, "NamedTemporaryFile", fail)
    for output in ("out", "b.png"):
        status, _, err = up("in/a.png" if output == "b.png" else "in", output)
        assert status == 2 and "cannot be written (Read-only" in err and err.count("\n") == 1


def test_a_full_disk_stops_the_work_and_a_name_that_is_too_long_does_not(up, monkeypatch):
    """upscale.save."""
    save_in(*[f"{i}.png" for i in range(6)])
    long = "x" * 250 + ".gif"                                    # 254 bytes; with .avif, 255
    RGB.save(Path("in", long))
    Path("in", long).rename(Path("in", "x" * 251 + ".gif"))
    status, out, err = up("in", "out", "--ext", "webp")
    assert status == 1 and out.startswith("out: 6 of 7") and "File name too long" in err

    def write(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")
    computed, real = [], srgan.upscale
    monkeypatch.setattr(Path, "write_bytes", write)
    monkeypatch.setattr(srgan, "upscale", lambda *args, **options: computed.append(0)
                        or real(*args, **options))
    status, out, err = up("in", "full")
    assert status == 2 and len(computed) == 2 and err.count("No space left") == 1
    assert written("full") == []


def test_an_image_that_another_process_makes_is_left_to_it(up):
    """upscale.claimed."""
    save_in("a.png", "b.png")
    Path("out").mkdir()
    with upscale.claimed(Path("out/a.png")):
        status, out, err = up("in", "out")
        assert status == 0 and out.startswith("out: 1 of 2 images")
        assert "out/a.png: skipped, as another process is making it" in err
    assert up("in", "out")[1].startswith("out/a.png: 120x80")
    assert written("out") == ["a.png", "b.png"]


def test_an_empty_output_does_not_count_as_done(up):
    """upscale.is_done: a power cut may leave one."""
    save_in("a.png")
    Path("out").mkdir(), Path("out/a.png").touch()
    assert up("in", "out")[0] == 0 and Image.open("out/a.png").size == (120, 80)
    assert "1 of 1 exist" in up("in", "out")[2]


def test_the_longest_side_of_a_format_is_known_before_the_work(tmp_path):
    """upscale.decode."""
    for side, out in ((16_376, "a.jpg"), (4_096, "a.webp"), (8_193, "a.avif")):
        Image.new("L", (side, 1)).save(tmp_path / "a.png")
        with pytest.raises(srgan.InputError, match="pixels per side"):
            upscale.decode(tmp_path / "a.png", tmp_path / out, 4)
        Image.new("L", (side - 1, 1)).save(tmp_path / "a.png")
        assert upscale.decode(tmp_path / "a.png", tmp_path / out, 4).size == (side - 1, 1)


def test_a_fresh_process_writes_other_formats_than_png(ckpt, tmp_path):
    """upscale.main, in a process in which Pillow has not loaded its plug-ins yet."""
    RGB.save(tmp_path / "a.png")
    command = [sys.executable, ROOT / "upscale.py", "a.png", "out.tif", "--ckpt", ckpt]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert Image.open(tmp_path / "out.tif").size == (120, 80)


def test_a_line_says_name_size_and_precision_and_a_terminal_shows_a_bar(up, monkeypatch):
    RGB.save("a.png")
    status, out, err = up("a.png", "b.png")
    assert out.startswith("b.png: 120x80 pixels, fp32, ") and out.count("\n") == 1
    assert ", x4, on cpu, in fp32" in err and "%" not in err     # stderr is not a terminal
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda stream: True)
    assert "0/1 [" in up("a.png", "c.png")[2]                    # a bar over parts
    assert "2/2 [" in up("a.png", "b.png", "d/")[2]              # a bar over images


def test_what_a_user_can_cause_is_one_line_and_status_2(up, tmp_path):
    RGB.save("a.png"), RGB.save("a.jpg"), Image.new("RGBA", (30, 20)).save("alpha.png")
    (tmp_path / "text.png").write_text("hello"), (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty").mkdir(), Image.new("L", (5000, 1)).save("wide.png")
    table = """    missing.png: missing.png out.png      | missing.png: a.png missing.png out/
                   text.png: text.png out.png            | empty: empty out
                   is a folder: a.png empty              | is a folder: a.png folder.png
                   endings: a.png out.xyz                | no such folder: a.png no/where.png
                   ends in /: a.png a.jpg text.png       | ends in /: a.png a.jpg new.png
                   transparency: alpha.png out.jpg       | 16,383 pixels: wide.png out.webp
                   cannot be written: a.png /proc/no.png | x.pth: a.png out.png --ckpt x.pth
                   text.png: a.png o.png --ckpt text.png | cannot be used: a.png o.png --device gpu
                   megapixels: a.png out.png --max-megapixels 0.0005"""
    for options in ("--blend 1.5", "--outscale 0", "--tile -1", "--max-megapixels 0"):
        assert options.split()[0] in up("a.png", "out.png", *options.split())[2], options
    for line in table.replace("|", "\n").splitlines():
        words, args = line.strip().split(": ")
        status, _, err = up(*args.split())
        assert status == 2 and words in err.splitlines()[-1], (args, err)
        assert len(err.splitlines()) == 1 + (", x4, on cpu" in err), err
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".*"))
    assert ", x4, on" not in up("missing.png", "out.png")[2]     # before a model is loaded
    assert up("a.png", "out.png", "--max-megapixels", "0.0006")[0] == 0


def test_models_and_blends_come_from_the_weights_folder(script, tmp_path, monkeypatch):
    monkeypatch.setattr(upscale, "WEIGHTS", tmp_path)
    generator = srgan.Generator(channels=4, n_blocks=1)
    srgan.save_checkpoint(tmp_path / "srresnet.pth", generator)
    torch.nn.init.constant_(generator.tail.bias, 2.0)
    RGB.save(tmp_path / "a.png")
    assert script("upscale", "a.png", "out.png", "--model", "srgan")[0] == 2
    srgan.save_checkpoint(tmp_path / "srgan.pth", generator)

    def mean(*options):
        status, _, err = script("upscale", "a.png", "out.png", "--overwrite", *options)
        assert status == 0, err
        return np.asarray(Image.open(tmp_path / "out.png"), float).mean()
    assert mean() == mean("--model", "srgan") == mean("--blend", "1")
    assert mean("--model", "srresnet") == mean("--blend", "0") < mean("--blend", "0.5") < mean()


def test_impossible_options_are_refused(script):
    for line in """--blend 1.5 | --blend nan | --outscale 0 | --outscale nan | --tile -1
                   --ckpt x --model srgan | --blend 1 --model srgan | --max-megapixels nan
                   """.replace("|", "\n").strip().split("\n"):
        assert script("upscale", "a.png", "out.png", *line.split())[0] == 2, line


@pytest.mark.skipif(not (shutil.which("ffmpeg") and shutil.which("ffprobe")), reason="needs ffmpeg")
def test_the_readmes_video_recipe_keeps_colours_shape_speed_and_sound(tmp_path):
    """The commands as they are printed there, on three green frames of wide pixels."""
    def run(command):
        return subprocess.run(["bash", "-ec", command], cwd=tmp_path, check=True, env=environment,
                              capture_output=True).stdout
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "upscale.py").symlink_to(ROOT / "upscale.py")
    run("ffmpeg -f lavfi -i color=0x00ff00:s=44x34:r=30:d=0.1 -f lavfi -i sine=d=0.1 -c:v libx264"
        " -qp 0 -pix_fmt yuv444p -vf scale=out_color_matrix=bt709,setparams=colorspace=bt709,"
        "setsar=15/11 -c:a pcm_s16le -f mov in.mp4")
    section = (ROOT / "README.md").read_text("utf-8").split("A video is enlarged")[1]
    run(section.split("```bash")[1].split("# Before all this")[0])
    facts = run("ffprobe -v error -of json -show_streams out.mp4")
    video, sound = json.loads(facts)["streams"]
    assert (video["width"], video["height"]) == (4 * 60, 4 * 34) and video["nb_frames"] == "3"
    assert video["r_frame_rate"] == "30/1" and sound["codec_name"] == "aac"
    assert {video["color_space"], video["color_primaries"], video["color_transfer"]} == {"bt709"}
    planes = run("ffmpeg -i out.mp4 -frames:v 1 -f rawvideo -pix_fmt yuv444p -")
    y, cb, cr = np.frombuffer(planes, np.uint8).reshape(3, -1).mean(1)
    assert abs(y - 173) < 6 and abs(cb - 42) < 6 and abs(cr - 26) < 6    # BT.601: 145, 54, 34
