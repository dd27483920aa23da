"""Section 4: which HR image belongs to which LR image, and to which part of a split."""
import hashlib
from pathlib import Path

import numpy as np
import pytest
from conftest import photo
from PIL import Image

import srgan


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Tests run in an empty folder, so that paths are short."""
    monkeypatch.chdir(tmp_path)


def save(path, h=8, w=8):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(h, w)).save(path)


# Pairs

def test_hr_images_without_lr_are_sorted_by_name():
    """find_pairs."""
    for name in ("b.png", "c.jpg", "sub/a.png"):
        save(f"photos/{name}")
    assert srgan.find_pairs("photos") == [("a", Path("photos/sub/a.png"), None),
                                          ("b", Path("photos/b.png"), None),
                                          ("c", Path("photos/c.jpg"), None)]


@pytest.mark.parametrize("lr_folder", ["LR_bicubic_x4", "LR_bicubic/X4"])
def test_lr_images_beside_hr_are_found(lr_folder):
    """find_pairs."""
    save("set/HR/a.png")
    save(f"set/{lr_folder}/a.png", 2, 2)
    assert srgan.find_pairs("set") == [("a", Path("set/HR/a.png"), Path(f"set/{lr_folder}/a.png"))]


@pytest.mark.parametrize("options", [{"scale": 2}, {"kernel": "gaussian"}])
def test_lr_images_of_another_scale_or_kernel_are_not_taken(options):
    """find_pairs."""
    save("set/HR/a.png")
    save("set/LR_bicubic_x4/a.png", 2, 2)
    assert srgan.find_pairs("set", **options) == [("a", Path("set/HR/a.png"), None)]


def test_a_folder_of_lr_images_that_is_named_comes_first():
    """find_pairs, with lr_folder."""
    save("set/HR/a.png")
    save("set/LR_bicubic_x4/a.png", 2, 2)
    save("other/a.png", 2, 2)
    assert srgan.find_pairs("set", "other") == [("a", Path("set/HR/a.png"), Path("other/a.png"))]


@pytest.mark.parametrize("hr, lr", [
    ("a", "a"), ("a", "ax4"), ("a", "a_x4"), ("a", "a_LR"), ("a", "a_LRx4"), ("a", "a_LR_x4"),
    ("a", "a_LR4"), ("a", "a_bicLRx4"), ("a", "a_LRBI_x4"),
    ("img_SRF_4_HR", "img_SRF_4_LR"), ("a_HR_x4", "a_LRBI_x4"), ("a_HRx4", "a_LRx4"),
    ("max2", "max2x4"), ("v1.5", "v1.5x4")])
def test_an_lr_image_is_named_like_its_hr_image_or_with_a_usual_ending(hr, lr):
    """lr_names, by find_pairs."""
    save(f"HR/{hr}.png")
    save(f"LR/{lr}.png", 2, 2)
    save("LR/b.png", 2, 2)
    assert srgan.find_pairs("HR", "LR") == [(hr, Path(f"HR/{hr}.png"), Path(f"LR/{lr}.png"))]


@pytest.mark.parametrize("lr", ["a4", "a_LRx2", "ab", "A"])
def test_an_lr_image_of_another_name_or_scale_is_none(lr):
    """lr_names, by find_pairs."""
    save("HR/a.png")
    save(f"LR/{lr}.png", 2, 2)
    with pytest.raises(srgan.InputError, match="a.png: LR holds no image of this name"):
        srgan.find_pairs("HR", "LR")


def test_equal_names_are_paired_by_their_subfolders():
    """find_pairs: frames of two videos."""
    for video in ("000", "001"):
        save(f"HR/{video}/00000001.png")
        save(f"LR/{video}/00000001x4.png", 2, 2)
    assert srgan.find_pairs("HR", "LR") == [
        ("000/00000001", Path("HR/000/00000001.png"), Path("LR/000/00000001x4.png")),
        ("001/00000001", Path("HR/001/00000001.png"), Path("LR/001/00000001x4.png"))]


def test_links_to_folders_are_subfolders_like_others():
    """find_pairs: two videos, one of which is a link in HR and in LR, and hidden thumbnails."""
    for kind in ("HR", "LR"):
        save(f"{kind}/000/1.png")
        save(f"elsewhere/{kind}/1.png")
        save(f"{kind}/.thumbnails/1.png")
        Path(kind, "001").symlink_to(Path("elsewhere", kind).absolute())
    pairs = srgan.find_pairs("HR", "LR")
    assert pairs == [("000/1", Path("HR/000/1.png"), Path("LR/000/1.png")),
                     ("001/1", Path("HR/001/1.png"), Path("LR/001/1.png"))]


def test_equal_names_of_which_one_has_no_lr_are_not_paired_across_subfolders():
    """find_pairs."""
    for video in ("000", "001"):
        save(f"HR/{video}/1.png")
    save("LR/000/1.png", 2, 2)
    with pytest.raises(srgan.InputError, match="001/1.png: LR holds no image"):
        srgan.find_pairs("HR", "LR")


def test_names_that_differ_are_paired_wherever_the_images_are():
    """find_pairs: HR in subfolders, LR in one folder."""
    for name in ("animals/a", "plants/b"):
        save(f"HR/{name}.png")
        save(f"LR/{Path(name).name}.png", 2, 2)
    pairs = srgan.find_pairs("HR", "LR")
    assert [(stem, lr.name) for stem, _, lr in pairs] == [("a", "a.png"), ("b", "b.png")]


def test_two_images_of_one_name_in_one_folder_are_refused():
    """by_stem, by find_pairs."""
    save("HR/a.png")
    save("HR/a.jpg")
    with pytest.raises(srgan.InputError, match="a.png and HR/a.jpg have the same name"):
        srgan.find_pairs("HR")


@pytest.mark.parametrize("hr, lr", [
    ("i_HR.png", "i_LR.png"), ("i.png", "ix4.png"), ("i.png", "i_LRBI_x2.png"),
    ("Set5/HR/i.png", "Set5/LR_bicubic/X4/i.png"), ("i.png", "x8/i.png")])
def test_a_folder_that_mixes_hr_and_lr_is_refused(hr, lr):
    """find_hr."""
    save(f"mixed/{hr}")
    save(f"mixed/{lr}", 4, 4)
    with pytest.raises(srgan.InputError, match="mixed also holds LR images"):
        srgan.find_hr("mixed")


def test_the_images_in_hr_are_found_without_those_beside_it():
    """find_hr."""
    save("set/HR/a.png")
    save("set/LR_bicubic_x4/a.png", 2, 2)
    assert srgan.find_hr("set") == [Path("set/HR/a.png")]


# LR and HR of a pair

def test_hr_is_cropped_to_whole_lr_pixels():
    """open_pair."""
    save("a.png", 11, 13)
    lr, hr = srgan.open_pair(Path("a.png"))
    assert np.array_equal(hr, photo(11, 13)[:8, :12]) and lr.shape == (2, 3, 3)


def test_lr_is_made_from_the_cropped_hr():
    """open_pair: what is cut off does not count."""
    save("a.png", 11, 13)
    Image.fromarray(photo(11, 13)[:8, :12]).save("cropped.png")
    lr, _ = srgan.open_pair(Path("a.png"))
    again, _ = srgan.open_pair(Path("cropped.png"))
    assert np.array_equal(lr, again)


def test_lr_is_that_of_the_file_if_there_is_one():
    """open_pair."""
    save("hr.png", 9, 9)
    save("lr.png", 2, 2)
    lr, _ = srgan.open_pair(Path("hr.png"), Path("lr.png"))
    assert np.array_equal(lr, photo(2, 2))


def test_lr_of_a_wrong_size_is_refused():
    """open_pair."""
    save("hr.png", 9, 9)
    save("lr.png", 2, 2)
    with pytest.raises(srgan.InputError, match="lr.png: 2x2 is not 1/2 of hr.png .expected 4x4"):
        srgan.open_pair(Path("hr.png"), Path("lr.png"), scale=2)


@pytest.mark.parametrize("h, w", [(3, 20), (20, 3)])
def test_an_image_smaller_than_an_lr_pixel_is_refused(h, w):
    """open_pair."""
    save("a.png", h, w)
    with pytest.raises(srgan.InputError, match=f"a.png: {w}x{h} is smaller than one LR pixel"):
        srgan.open_pair(Path("a.png"))


# The split

PAIRS = [(str(i), Path(f"photos/{i}.png"), None) for i in range(40)]


def test_a_split_divides_the_images_by_percentages():
    """split."""
    parts = srgan.split(PAIRS, (80, 15, 5))
    assert {name: len(part) for name, part in parts.items()} == {"train": 32, "val": 6, "test": 2}


def test_a_split_holds_each_image_once():
    """split."""
    parts = srgan.split(PAIRS, (80, 15, 5))
    assert sorted(parts["train"] + parts["val"] + parts["test"]) == sorted(PAIRS)


def test_val_holds_the_images_whose_names_have_the_lowest_sha_256():
    """split: the same on every machine."""
    ranked = sorted(PAIRS, key=lambda pair: hashlib.sha256(pair[1].name.encode()).digest())
    assert sorted(ranked[:6]) == sorted(srgan.split(PAIRS, (80, 15, 5))["val"])


def test_a_split_depends_on_names_alone():
    """split: not on the order or the folder."""
    moved = [(stem, Path("other", path.name), None) for stem, path, _ in reversed(PAIRS)]
    for name, part in srgan.split(PAIRS).items():
        assert {pair[0] for pair in srgan.split(moved)[name]} == {pair[0] for pair in part}


def test_validate_on_takes_images_from_val_to_train():
    """split."""
    whole = srgan.split(PAIRS, (80, 15, 5))
    few = srgan.split(PAIRS, (80, 15, 5), validate_on=2)
    assert len(few["val"]) == 2 and set(few["val"]) < set(whole["val"])
    assert few["test"] == whole["test"]
    assert sorted(few["train"] + few["val"]) == sorted(whole["train"] + whole["val"])


def test_each_part_is_sorted_by_path():
    """split."""
    for part in srgan.split(PAIRS).values():
        assert part == sorted(part, key=lambda pair: pair[1])


def test_a_part_with_a_share_gets_an_image_and_one_without_gets_none():
    """split, of two images."""
    parts = srgan.split(PAIRS[:2], (95, 5, 0))
    assert {name: len(part) for name, part in parts.items()} == {"train": 1, "val": 1, "test": 0}
