"""upscale.py: what is read, kept, written and said."""
import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photo
from PIL import Image, ImageCms

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


@pytest.mark.parametrize("out", ["out.png", "out.jpg", "out.webp", "out.tif"])
def test_icc_profile_dpi_and_exif_are_kept_and_orientation_is_applied(result, out):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[UPRIGHT], exif[271] = 6, "Maker"
    exif[0x8769] = {36867: "2023:01:02 03:04:05", 40962: 30}     # date, and the old width
    exif[0x8825] = {1: "N", 2: (52.0, 30.0, 12.5)}
    large = result(RGB, "a.jpg", out, icc_profile=profile, dpi=(300, 300), exif=exif)
    kept = large.getexif()
    assert kept.get(UPRIGHT, 1) == 1 and near(large, RGB.rotate(-90, expand=True))
    assert kept[271] == "Maker" and kept.get_ifd(0x8825)[2] == (52.0, 30.0, 12.5)
    assert kept.get_ifd(0x8769) == {36867: "2023:01:02 03:04:05"}
    assert large.info["icc_profile"] == profile
    if out != "out.webp":
        assert large.info["dpi"] == pytest.approx((300, 300), abs=0.1)
    if out == "out.jpg":                                         # quality 95, 4:4:4
        assert max(large.quantization[0]) <= 12
        assert large.layer[0][1:3] == large.layer[1][1:3] == (1, 1)


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


def test_failures_and_unread_formats_are_listed_and_the_other_images_are_done(up):
    save_in("a.png", "d.png", "e.png")
    Path("out/d.png").mkdir(parents=True)                        # in the way
    for name in ("b.png", "c.png", "I.HEIC", "raw.cr2", "scan.pdf", "notes.txt", "._.pdf"):
        Path("in", name).write_text("hello")
    status, out, err = up("in", "out", "--overwrite")
    assert status == 1 and out.startswith("out: 2 of 5 images") and len(err.splitlines()) == 5, err
    assert all(f"{name}.png: cannot be" in err for name in ("in/b", "in/c", "out/d"))
    assert err.count("skipped") == 1 and "I.HEIC, raw.cr2, scan.pdf;" in err and "notes" not in err
    assert written("out") == ["a.png", "d.png", "e.png"]
    assert up("in/c.png", "in/b.png", "other")[0] == 2           # none was done


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
    for line in """--blend 1.5 | --blend nan | --outscale 0 | --outscale nan | --tile -1 | --ckpt=
                   --ckpt x --model srgan | --blend 1 --model srgan | --max-megapixels nan
                   """.replace("|", "\n").strip().split("\n"):
        assert script("upscale", "a.png", "out.png", *line.split())[0] == 2, line
    for empty in (("", "out.png"), ("a.png", "")):
        assert "is empty" in script("upscale", *empty)[2]


def test_libtiffs_own_messages_do_not_appear(tmp_path, capfd):
    path = tmp_path / "a.tif"
    RGB.save(path, compression="tiff_lzw")
    data = bytearray(path.read_bytes())
    data[400] ^= 0xff
    path.write_bytes(data)
    for read in (functools.partial(upscale.decode, result=path, scale=4), srgan.open_image):
        with pytest.raises(srgan.InputError, match="a.tif"):
            read(path)
        assert bool(capfd.readouterr().err) == (read is srgan.open_image)   # there are some
