"""evaluate.py: what is measured, against which LR images, and where it is written."""
import csv
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import photo
from PIL import Image

import evaluate
import srgan


@pytest.fixture(autouse=True)
def test_set(script):
    """set/HR and set/LR_bicubic_x4, three images each; beside them tiny.pth. Tests run there."""
    for i in range(3):
        hr = photo(64 + 4 * i, 72, i)
        lr = Image.fromarray(hr).resize((18, 16 + i), Image.Resampling.BICUBIC)
        write(f"set/HR/i{i}.png", hr)
        write(f"set/LR_bicubic_x4/i{i}.png", np.asarray(lr))
    checkpoint("tiny.pth")


def write(path, pixels):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, lossless=True)


def checkpoint(path, scale=4, **more):
    srgan.save_checkpoint(path, srgan.Generator(scale, channels=4, n_blocks=1), **more)


@pytest.fixture
def run(script):
    """run("--data", ...) runs evaluate.py without LPIPS: (exit status, stdout, stderr)."""
    return functools.partial(script, "evaluate", "--no-lpips")


@pytest.fixture
def measured(run):
    """The same, but returns the JSON document."""
    def call(*args, status=0):
        found, _, err = run(*args, "--json", "r.json")
        assert found == status, err
        return json.loads(Path("r.json").read_text())
    return call


def bicubic(document):
    """The mean PSNR of bicubic."""
    return document["models"]["bicubic"]["psnr"]["mean"]


def expected(function, upscale, scale=4, **protocol):
    """A metric of upscale(lr) for each image of `set`, with LR made from HR unless scale is 4."""
    values = []
    for i in range(3):
        lr_path = Path(f"set/LR_bicubic_x4/i{i}.png") if scale == 4 else None
        lr, hr = srgan.open_pair(Path(f"set/HR/i{i}.png"), lr_path, scale)
        values.append(function(upscale(lr), hr, **protocol))
    return values


def upscalers():
    """{model: function of LR}, as the models of a table with tiny.pth are meant."""
    generator = srgan.optimize_for_inference(srgan.load_generator("tiny.pth"))
    return {"nearest": lambda lr: lr.repeat(4, 0).repeat(4, 1),
            "bicubic": srgan.interpolate,
            "tiny.pth": lambda lr: srgan.upscale(generator, lr)}


# What is measured

@pytest.mark.parametrize("metric", ["psnr", "ssim"])
@pytest.mark.parametrize("model", ["nearest", "bicubic", "tiny.pth"])
def test_each_image_is_measured_on_y_without_a_border_of_4(measured, model, metric):
    """main: the values of each image in the JSON document."""
    found = measured("--data", "set", "--ckpt", "tiny.pth")["models"][model]["images"]
    values = expected(srgan.METRICS[metric].function, upscalers()[model], shave=4, luma=True)
    assert [found[f"i{i}"][metric] for i in range(3)] == pytest.approx(values, abs=1e-9)


def test_a_border_as_wide_as_the_scale_is_left_out(measured):
    """main, with --scale 2: 2 pixels."""
    document = measured("--data", "set", "--scale", "2")
    values = expected(srgan.psnr, lambda lr: srgan.interpolate(lr, 2), 2, shave=2)
    assert bicubic(document) == pytest.approx(np.mean(values), abs=1e-9)


def test_shave_sets_another_border(measured):
    """main, with --shave."""
    document = measured("--data", "set", "--shave", "0")
    values = expected(srgan.psnr, srgan.interpolate, shave=0)
    assert bicubic(document) == pytest.approx(np.mean(values), abs=1e-9)


def test_rgb_measures_all_three_colours(measured):
    """main, with --rgb."""
    document = measured("--data", "set", "--rgb")
    values = expected(srgan.psnr, srgan.interpolate, shave=4, luma=False)
    assert bicubic(document) == pytest.approx(np.mean(values), abs=1e-9)


def test_the_mean_and_the_standard_deviation_are_over_the_images(measured):
    """report_models."""
    scores = measured("--data", "set")["models"]["bicubic"]
    values = expected(srgan.ssim, srgan.interpolate)
    summary = {"mean": np.mean(values), "std": np.std(values)}
    assert scores["ssim"] == pytest.approx(summary, abs=1e-9)


def test_without_lpips_its_values_are_null(measured):
    """main, with --no-lpips."""
    scores = measured("--data", "set")["models"]["bicubic"]
    assert scores["lpips"] is None and scores["images"]["i0"]["lpips"] is None


def test_lpips_is_measured_where_its_network_is_there(script, monkeypatch):
    """main, without --no-lpips; the network has random weights."""
    lpips = pytest.importorskip("lpips")
    monkeypatch.setattr(lpips, "LPIPS", functools.partial(lpips.LPIPS, pnet_rand=True))
    script("evaluate", "--data", "set", "--json", "r.json")
    assert json.loads(Path("r.json").read_text())["models"]["bicubic"]["lpips"]["mean"] > 0


def test_lpips_without_its_weights_is_left_out_with_a_line_that_says_where_they_are(
        script, monkeypatch):
    """main, on a machine without a network."""
    pytest.importorskip("lpips")
    from torchvision.models import _api

    def fail(url, *args, **options):
        raise OSError("no way to the server")

    monkeypatch.setattr(_api, "load_state_dict_from_url", fail)
    status, _, err = script("evaluate", "--data", "set", "--json", "r.json")
    assert status == 0 and srgan.ALEXNET_URL in err and "no way to the server" in err
    assert json.loads(Path("r.json").read_text())["models"]["bicubic"]["lpips"] is None


def test_an_image_of_one_colour_does_not_change_the_means(measured):
    """main: PSNR would be infinite on it. It is left out, which the status tells."""
    before = bicubic(measured("--data", "set/HR"))
    write("set/HR/flat.png", np.full((64, 64, 3), 99, np.uint8))
    assert bicubic(measured("--data", "set/HR", status=1)) == before


def test_images_that_equal_the_originals_count_100_db(measured):
    """main, with --sr."""
    models = measured("--data", "set", "--sr", "set/HR")["models"]
    assert models["set/HR"]["psnr"] == {"mean": 100, "std": 0}


def test_what_cannot_be_measured_is_left_out_with_a_line(run):
    """main: a broken image, one smaller than an LR pixel, one too small for SSIM."""
    Path("set/HR/i1.png").write_text("hello")
    write("set/HR/i3.png", photo(3, 3))
    write("set/HR/i4.png", photo(16, 16))
    status, out, err = run("--data", "set/HR")
    assert status == 1 and "set/HR: 2 images" in out
    first, second, third = err.strip().splitlines()
    assert "i1.png" in first and "i3.png" in second and "i4: SSIM needs 11x11" in third


def test_an_image_that_one_model_lacks_is_left_out_for_all(measured):
    """main, with --sr: i1 has another size, i2 is missing."""
    write("theirs/i0.png", photo(64, 72))
    write("theirs/i1.png", photo(72, 72))
    models = measured("--data", "set", "--sr", "theirs", status=1)["models"]
    assert [list(scores["images"]) for scores in models.values()] == [["i0"], ["i0"], ["i0"]]


# Against which LR images

def test_lr_images_beside_hr_are_taken(measured):
    """main: --data with HR/ and LR_bicubic_x4/."""
    document = measured("--data", "set")
    assert document["protocol"]["lr"] == "LR images of the folder"
    values = expected(srgan.psnr, srgan.interpolate)
    assert bicubic(document) == pytest.approx(np.mean(values), abs=1e-9)


def test_lr_images_in_the_layout_of_the_benchmarks_are_taken(measured):
    """main: --data with HR/ and LR_bicubic/X4/."""
    before = bicubic(measured("--data", "set"))
    Path("set/LR_bicubic").mkdir()
    Path("set/LR_bicubic_x4").rename("set/LR_bicubic/X4")
    document = measured("--data", "set")
    assert document["protocol"]["lr"] == "LR images of the folder" and bicubic(document) == before


def test_lr_data_names_lr_images_elsewhere(measured):
    """main, with --lr-data: darker ones."""
    for i in range(3):
        write(f"other/i{i}x4.png", srgan.open_rgb(f"set/LR_bicubic_x4/i{i}.png") // 2)
    document = measured("--data", "set", "--lr-data", "other")
    values = expected(srgan.psnr, lambda lr: srgan.interpolate(lr // 2))
    assert document["protocol"]["lr"] == "other"
    assert bicubic(document) == pytest.approx(np.mean(values), abs=1e-9)


@pytest.mark.parametrize("kernel", srgan.KERNELS)
def test_lr_is_made_from_hr_by_the_kernel(measured, kernel):
    """main, with --kernel."""
    document = measured("--data", "set/HR", "--kernel", kernel)
    values = []
    for i in range(3):
        lr, hr = srgan.open_pair(f"set/HR/i{i}.png", None, 4, kernel)
        values.append(srgan.psnr(srgan.interpolate(lr), hr))
    assert document["protocol"]["lr"] == f"{kernel} x1/4 of HR"
    assert bicubic(document) == pytest.approx(np.mean(values), abs=1e-9)


def test_lr_images_of_another_kernel_are_not_taken(measured):
    """main, with --kernel: `set` holds bicubic LR images."""
    document = measured("--data", "set", "--kernel", "gaussian")
    assert document["protocol"]["lr"] == "gaussian x1/4 of HR"
    assert bicubic(document) == bicubic(measured("--data", "set/HR", "--kernel", "gaussian"))


@pytest.mark.parametrize("options, kernel", [
    (["--ckpt", "gaussian.pth", "bicubic.pth"], "gaussian"),
    (["--ckpt", "bicubic.pth", "gaussian.pth"], "bicubic"),
    (["--ckpt", "tiny.pth", "gaussian.pth"], "bicubic"),
    (["--ckpt", "gaussian.pth", "--kernel", "bicubic"], "bicubic")])
def test_lr_is_made_as_for_the_first_checkpoint_unless_a_kernel_is_named(
        measured, options, kernel):
    """main, with --ckpt; tiny.pth does not say how its LR was made."""
    for name in srgan.KERNELS:
        checkpoint(f"{name}.pth", config={"kernel": name})
    document = measured("--data", "set/HR", *options)
    assert document["protocol"]["lr"] == f"{kernel} x1/4 of HR"
    assert bicubic(document) == bicubic(measured("--data", "set/HR", "--kernel", kernel))


def test_the_scale_is_that_of_the_checkpoints(measured):
    """pick_scale."""
    checkpoint("x2.pth", scale=2)
    assert measured("--data", "set", "--ckpt", "x2.pth")["scale"] == 2


# Which images

def part(measured, *options):
    """The images that are measured, of 40 in the folder `faces`."""
    for i in range(40):
        write(f"faces/{i:06d}.png", photo(24, 24, i))
    return list(measured("--data", "faces", *options)["models"]["bicubic"]["images"])


@pytest.mark.parametrize("name", ["train", "val", "test"])
def test_a_split_is_that_of_the_default_settings(measured, name):
    """part_of, without a checkpoint."""
    found = part(measured, "--split", name)
    pairs = srgan.split(srgan.find_pairs("faces"), (80, 15, 5))[name]
    assert found == [stem for stem, _, _ in pairs]


@pytest.mark.parametrize("first, second", [("a.pth", "b.pth"), ("b.pth", "a.pth")])
def test_a_split_is_that_of_the_first_checkpoint(measured, first, second):
    """part_of, with checkpoints of other settings."""
    settings = {"a.pth": ([80, 15, 5], 2), "b.pth": ([50, 30, 20], 0)}
    for path, (shares, limit) in settings.items():
        checkpoint(path, config={"split": shares, "validate_on": limit})
    found = part(measured, "--split", "val", "--ckpt", first, second)
    pairs = srgan.split(srgan.find_pairs("faces"), *settings[first])["val"]
    assert found == [stem for stem, _, _ in pairs]


def test_images_of_the_same_name_are_told_apart_by_their_folders(measured):
    """main: frames of two videos, and SR images in folders of the same names."""
    for i, video in enumerate(("000", "001")):
        hr = photo(64, 64, i)
        write(f"videos/{video}/00000001.png", hr)
        write(f"theirs/{video}/00000001_sr.png", hr // 2)
    images = measured("--data", "videos", "--sr", "theirs")["models"]["theirs"]["images"]
    assert list(images) == ["000/00000001", "001/00000001"]
    for stem, scores in images.items():
        hr = srgan.open_rgb(f"videos/{stem}.png")
        assert scores["psnr"] == srgan.psnr(hr // 2, hr)


# Other programs' images

@pytest.mark.parametrize("name", ["i{}.png", "i{}x4_net-v2.webp"])
def test_images_of_another_program_are_found_by_name_and_ending(measured, name):
    """find_sr."""
    for i in range(3):
        write("theirs/" + name.format(i), srgan.open_rgb(f"set/HR/i{i}.png") // 2)
    found = measured("--data", "set", "--sr", "theirs")["models"]["theirs"]["images"]
    for stem, scores in found.items():
        hr = srgan.open_rgb(f"set/HR/{stem}.png")
        assert scores["psnr"] == srgan.psnr(hr // 2, hr)


@pytest.mark.parametrize("there, ending", [
    (["img1_x", "img10_x", "img2_x"], "_x"),
    (["img10"], ""),                                             # not img1 with the ending 0
    (["img1_x", "img10_x", "img1a"], "_x")])                     # a stray one
def test_sr_images_have_the_ending_that_most_of_them_have(there, ending):
    """find_sr: img1 and img10, one of which begins the other."""
    for name in there:
        write(f"theirs/{name}.png", photo(8, 8))
    found = evaluate.find_sr("theirs", [("img1", None, None), ("img10", None, None)])
    assert found == {"img1": Path(f"theirs/img1{ending}.png"),
                     "img10": Path(f"theirs/img10{ending}.png")}


def test_hr_in_the_name_of_an_original_is_no_part_of_its_name():
    """find_sr: img_HR and img_SR."""
    write("theirs/img_SR.png", photo(8, 8))
    found = evaluate.find_sr("theirs", [("img_HR", None, None)])
    assert found == {"img_HR": Path("theirs/img_SR.png")}


def test_a_folder_may_have_the_name_of_a_baseline(measured):
    """make_models."""
    for i in range(3):
        write(f"bicubic/i{i}.png", srgan.open_rgb(f"set/HR/i{i}.png"))
    models = measured("--data", "set", "--sr", "bicubic")["models"]
    assert list(models) == ["nearest", "bicubic", "./bicubic"]
    assert models["bicubic"]["psnr"]["mean"] < 100 == models["./bicubic"]["psnr"]["mean"]


# What is printed

def test_the_first_line_says_how_it_was_measured(run):
    """main."""
    _, out, _ = run("--data", "set")
    assert out.splitlines()[0] == ("set: 3 images, x4, LR: LR images of the folder; PSNR and SSIM "
                                   "on Y, 4 border pixels removed, 8 bits")


def test_the_first_line_names_another_protocol(run):
    """main."""
    _, out, _ = run("--data", "set/HR", "--rgb", "--shave", "1", "--scale", "2", "--split", "val")
    assert out.splitlines()[0] == ("set/HR (val): 1 images, x2, LR: bicubic x1/2 of HR; PSNR and "
                                   "SSIM on RGB, 1 border pixels removed, 8 bits")


def test_the_table_has_a_row_of_means_and_deviations_for_each_model(run):
    """print_table."""
    _, out, _ = run("--data", "set", "--ckpt", "tiny.pth")
    rows = [line.split() for line in out.splitlines()[1:]]
    assert rows[0] == ["PSNR", "(dB)", "SSIM", "LPIPS"]
    for row, (model, upscale) in zip(rows[1:], upscalers().items(), strict=True):
        psnr = expected(srgan.psnr, upscale)
        ssim = expected(srgan.ssim, upscale)
        assert row == [model, f"{np.mean(psnr):.2f}", "±", f"{np.std(psnr):.2f}",
                       f"{np.mean(ssim):.4f}", "±", f"{np.std(ssim):.4f}", "-"]


def test_per_image_adds_a_row_for_each_image(run):
    """print_table, with --per-image."""
    _, out, _ = run("--data", "set", "--per-image")
    rows = [line.split() for line in out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["nearest", "i0", "i1", "i2", "bicubic", "i0", "i1", "i2"]
    values = expected(srgan.psnr, srgan.interpolate)
    assert [row[1] for row in rows[5:]] == [f"{value:.2f}" for value in values]


def test_the_last_line_says_what_was_written(run):
    """main."""
    _, out, _ = run("--data", "set", "--json", "new/r.json", "--csv", "r.csv",
                    "--save-images", "images")
    assert out.splitlines()[-1] == "wrote new/r.json, r.csv, images"


# What is written

def test_the_json_document_says_how_it_was_measured(measured):
    """main, with --json."""
    document = measured("--data", "set", "--rgb", "--shave", "2")
    assert list(document) == ["data", "scale", "protocol", "models"]
    assert document["data"] == "set" and document["scale"] == 4
    assert document["protocol"] == {"channels": "RGB", "shave": 2, "bits": 8,
                                    "lr": "LR images of the folder"}


def test_the_csv_file_has_a_row_for_each_model_and_image(run):
    """write_csv."""
    run("--data", "set", "--csv", "r.csv", "--json", "r.json")
    models = json.loads(Path("r.json").read_text())["models"]
    with open("r.csv", newline="") as file:
        rows = list(csv.reader(file))
    expected_rows = [["model", "image", "psnr", "ssim", "lpips"]]
    for model, scores in models.items():
        for stem, score in scores["images"].items():
            expected_rows.append([model, stem, str(score["psnr"]), str(score["ssim"]), ""])
    assert rows == expected_rows and len(rows) == 7


def test_the_sr_images_of_each_model_are_saved(run):
    """save_images."""
    run("--ckpt", "tiny.pth", "--data", "set", "--save-images", "images")
    lr = srgan.open_rgb("set/LR_bicubic_x4/i0.png")
    for model, upscale in upscalers().items():
        saved = srgan.open_rgb(f"images/{Path(model).stem}/i0.png")
        assert np.array_equal(saved, upscale(lr))


def test_a_sheet_compares_the_models_with_the_original(run):
    """save_images: nearest, bicubic and HR, 72 pixels each with 4 between, above their labels."""
    run("--data", "set", "--save-images", "images")
    sheet = srgan.open_rgb("images/comparison/i0.png")
    parts = [srgan.open_rgb(f"images/{model}/i0.png") for model in ("nearest", "bicubic")]
    parts.append(srgan.open_rgb("set/HR/i0.png"))
    for i, part in enumerate(parts):
        column = sheet[:, 76 * i:76 * i + 72]
        assert np.array_equal(column[:64], part) and (column[64:] < 128).any()


def test_images_from_subfolders_are_saved_in_subfolders(run):
    """save_images."""
    for video in ("000", "001"):
        write(f"videos/{video}/00000001.png", photo(64, 64))
    status, _, err = run("--data", "videos", "--save-images", "images")
    assert status == 0, err
    saved = sorted(str(path.relative_to("images")) for path in Path("images").rglob("*.png"))
    assert saved == [f"{folder}/{video}/00000001.png"
                     for folder in ("bicubic", "comparison", "nearest") for video in ("000", "001")]


def test_models_of_like_names_do_not_share_a_folder():
    """image_folders."""
    models = ["bicubic", "a/b.pth", "x/a/b.v2.pth", "x/a/b.pth", "/a/b", "..", ".", "comparison"]
    folders = evaluate.image_folders("out", models)
    names = {str(path).lower() for path in folders.values()} | {"out/comparison"}
    assert len(names) == len(models) + 1
    for path in folders.values():
        assert path.parent == Path("out") and path.name.strip(".")


def test_the_folder_of_a_model_is_called_like_the_end_of_its_path():
    """image_folders."""
    folders = evaluate.image_folders("out", ["runs/gan/checkpoint_best_psnr.pth"])
    assert list(folders.values()) == [Path("out/gan_checkpoint_best_psnr")]


@pytest.mark.parametrize("options", [
    "--save-images set", "--csv tiny.pth", "--json set/LR_bicubic_x4/i0.png", "--csv set/new.csv",
    "--csv other/i0.png", "--csv results/theirs/new.csv", "--csv link/new.csv",
    "--save-images results"])
def test_no_output_is_written_into_an_input(run, options):
    """check_outputs: nothing changes. `link` leads to set; results/bicubic holds SR images."""
    for i in range(3):
        hr = srgan.open_rgb(f"set/HR/i{i}.png")
        write(f"results/bicubic/i{i}.png", hr)
        write(f"results/theirs/i{i}.png", hr)
        write(f"other/i{i}.png", srgan.open_rgb(f"set/LR_bicubic_x4/i{i}.png"))
    Path("link").symlink_to("set")
    before = {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}
    status, _, err = run("--data", "set", "--ckpt", "tiny.pth", "--lr-data", "other",
                         "--sr", "results/theirs", "results/bicubic", *options.split())
    assert status == 2 and "name another output" in err
    assert before == {path: path.read_bytes() for path in Path().rglob("*.*") if path.is_file()}


@pytest.mark.parametrize("output", ["folder", "/dev/null"])
@pytest.mark.parametrize("option", ["--json", "--csv"])
def test_an_output_that_is_no_file_is_refused_before_anything_is_measured(run, option, output):
    """check_outputs."""
    Path("folder").mkdir()
    status, out, err = run("--data", "set", option, output)
    assert status == 2 and out == "" and f"{output} is not a file; choose another name" in err


# What a user can cause

@pytest.mark.parametrize("args, words", [
    ("nowhere", "nowhere: no such file or folder"),
    ("empty", "empty: no images"),
    ("broken", "none of the 1 images could be measured"),
    ("incomplete", "holds no image of this name"),
    ("set --ckpt missing.pth", "missing.pth: no such file"),
    ("set --ckpt broken/a.png", "not a checkpoint"),
    ("set --ckpt tiny.pth x2.pth", "the scales differ: [2, 4]"),
    ("set --ckpt tiny.pth --scale 2", "the scales differ: [2, 4]"),
    ("set --ckpt val.pth --split val", "val.pth was trained with --val"),
    ("set --ckpt all.pth --split test", "no image belongs to its part test"),
    ("set --device gpu", "device 'gpu'"),
    ("set --sr nowhere", "nowhere: no such file or folder"),
    ("set --sr empty", "empty: no images"),
    ("set --lr-data nowhere", "nowhere: no such file or folder"),
    ("set --shave -1", "--shave must be 0 or more")])
def test_a_mistake_is_one_line_and_status_2(run, args, words):
    """main."""
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/a.png").write_text("hello")
    write("incomplete/HR/i0.png", photo(64, 64))
    write("incomplete/LR_bicubic_x4/i1.png", photo(16, 16))
    checkpoint("x2.pth", scale=2)
    checkpoint("val.pth", val="elsewhere")
    checkpoint("all.pth", config={"split": [95, 5, 0]})
    status, _, err = run("--data", *args.split())
    assert status == 2 and words in err.splitlines()[-1]
