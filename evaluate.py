"""Measure generators on a test set by the usual protocol (paper, Sec. 3.1).

    python evaluate.py --ckpt runs/gan/checkpoint_latest.pth weights/srresnet.pth --data Set14
    python evaluate.py --sr results/other_program --data Set14

The table has one row each for nearest-neighbour and bicubic upscaling, every checkpoint and every
--sr folder: mean and standard deviation over the images. LR is made from HR unless it is given.
An image that is identical to HR counts with a PSNR of 100 dB; images of one colour are left out.
Exit status: 0; 1 if some images could not be measured; 2 for wrong usage or unusable input.
"""
import csv
import os
import re
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

from PIL import Image

import srgan
from srgan import METRICS, InputError


def main():
    args = parse_args()
    device = srgan.pick_device(args.device)

    # The generators. The first checkpoint also says how LR is made and how images are split.
    generators = {}
    for path in args.ckpt:
        generator = srgan.load_generator(path, device)
        generators[path] = srgan.optimize_for_inference(generator)
    first = {}
    if args.ckpt:
        first = srgan.load_checkpoint(args.ckpt[0])
    config = first.get("config", {})

    # The images, and by which protocol they are compared.
    scale = pick_scale(args.scale, generators)
    shave = scale if args.shave is None else args.shave
    kernel = args.kernel or config.get("kernel", "bicubic")
    pairs = srgan.find_pairs(args.data, args.lr_data, scale, kernel)
    if args.split:
        pairs = part_of(pairs, args, first, config)

    # The rows of the table, and the files that are asked for.
    models = make_models(generators, args.sr, pairs, scale)
    folders = {}
    if args.save_images:
        folders = image_folders(args.save_images, models)
    check_outputs(args, folders)

    # Measure every model on every image.
    def save(stem, images, hr, scores):
        if args.save_images:
            save_images(folders, stem, images, hr, scores)

    names = srgan.usable_metrics(not args.no_lpips, device)
    results = srgan.measure_all(pairs, models, scale, kernel, save, names=names, shave=shave,
                                luma=not args.rgb)
    if not results:
        raise InputError(f"{args.data}: none of the {len(pairs)} images could be measured")

    # Say how it was measured, and show and write what was found.
    source = f"{kernel} x1/{scale} of HR"
    if pairs[0][2]:
        source = args.lr_data or "LR images of the folder"
    protocol = {"channels": "RGB" if args.rgb else "Y", "shave": shave, "bits": 8, "lr": source}
    report = {"data": args.data, "scale": scale, "protocol": protocol,
              "models": report_models(models, results)}
    part = f" ({args.split})" if args.split else ""
    print(f"{args.data}{part}: {len(results)} images, x{scale}, LR: {source}; PSNR and SSIM on "
          f"{protocol['channels']}, {shave} border pixels removed, 8 bits")
    print_table(report["models"], args.per_image)
    write_files(args, report)
    return 1 if len(results) < len(pairs) else 0


def parse_args():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", nargs="+", default=[], metavar="FILE", help="checkpoints of train.py")
    add("--sr", nargs="+", default=[], metavar="DIR", help="SR images, named like HR or HR_ending")
    add("--data", required=True, metavar="DIR", help="HR images, or HR/ and LR_bicubic_x4/")
    add("--lr-data", metavar="DIR", help="LR images made elsewhere, named like HR, HRx4 or HR_LR")
    add("--split", choices=("train", "val", "test"),
        help="only this part of --data, split as when --ckpt was trained (else 80/15/5)")
    add("--scale", type=int, choices=srgan.SCALES, help="default: the checkpoints', else 4")
    add("--kernel", choices=srgan.KERNELS, help="how LR is made (default: as for the first --ckpt)")
    add("--rgb", action="store_true", help="measure on RGB instead of Y")
    add("--shave", type=int, metavar="N", help="border pixels to remove (default: scale)")
    add("--no-lpips", action="store_true", help="skip LPIPS, which downloads AlexNet once")
    add("--per-image", action="store_true", help="also print a row for each image")
    add("--json", metavar="FILE", help="write all results as JSON")
    add("--csv", metavar="FILE", help="write a row for each model and image")
    add("--save-images", metavar="DIR", help="write all SR images, and sheets that compare them")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    if args.shave is not None and args.shave < 0:
        parser.error("--shave must be 0 or more")
    return args


def pick_scale(wanted, generators):
    """The scale that --scale and all generators have in common; 4 if none is given."""
    scales = {generator.arch["scale"] for generator in generators.values()}
    if wanted:
        scales.add(wanted)
    if len(scales) > 1:
        raise InputError(f"the scales differ: {sorted(scales)}; measure one scale at a time")
    return scales.pop() if scales else 4


def part_of(pairs, args, first, config):
    """The pairs of --split, divided as train.py divided them for the first checkpoint."""
    if first.get("val"):
        raise InputError(f"{args.ckpt[0]} was trained with --val, which held out no part of --data")
    shares = config.get("split", (80, 15, 5))
    part = srgan.split(pairs, shares, config.get("validate_on", 0))[args.split]
    if not part:
        raise InputError(f"{args.data}: no image belongs to its part {args.split}")
    return part


def make_models(generators, sr_folders, pairs, scale):
    """{name: function of LR and stem that gives SR}, one for each row of the table."""
    models = {"nearest": baseline(Image.Resampling.NEAREST, scale),
              "bicubic": baseline(Image.Resampling.BICUBIC, scale)}
    rows = {}
    for path, generator in generators.items():
        rows[path] = network(generator)
    for folder in sr_folders:
        rows[folder] = images_of(find_sr(folder, pairs))

    # A file or folder may be called like a baseline.
    for path, row in rows.items():
        name = f"./{path}" if path in ("nearest", "bicubic") else path
        models[name] = row
    return models


def baseline(method, scale):
    def super_resolve(lr, stem):
        return srgan.interpolate(lr, scale, method)
    return super_resolve


def network(generator):
    def super_resolve(lr, stem):
        return srgan.upscale(generator, lr)
    return super_resolve


def images_of(paths):
    def super_resolve(lr, stem):
        return srgan.open_rgb(paths[stem])
    return super_resolve


def find_sr(folder, pairs):
    """{stem: path of the SR image}. A path need not exist.

    SR images are named like HR images or share an ending, such as that of another program. They
    are in subfolders if HR images are told apart by theirs.
    """
    by_path = any("/" in stem for stem, _, _ in pairs)
    sr = srgan.by_stem(srgan.find_images(folder), folder if by_path else None)

    # The ending is the most frequent one; of equally frequent ones, the shortest.
    names = {stem: srgan.name_of(stem) for stem, _, _ in pairs}
    endings = Counter()
    for found in sr:
        for name in names.values():
            if found.startswith(name):
                endings[found[len(name):]] += 1
    ending = max(endings, key=lambda end: (endings[end], -len(end)), default="")

    paths = {}
    for stem, name in names.items():
        paths[stem] = sr.get(name + ending, Path(folder, f"{name}{ending}.png"))
    return paths


def image_folders(folder, models):
    """{model: its own folder in `folder`, such as gan_checkpoint_best_psnr}."""
    folders = {}
    taken = ["", "comparison"]
    for model in models:
        # The last two parts of its path, as letters, digits, hyphens and underscores.
        parts = Path(os.path.splitext(model)[0]).parts[-2:]
        name = re.sub(r"[^\w-]+", "_", "/".join(parts)).strip("_")
        while name in taken:
            name += "_2"
        taken.append(name)
        folders[model] = Path(folder, name)
    return folders


def check_outputs(args, folders):
    """Make the folders of the outputs. Raises InputError if an output lies inside an input."""
    inputs = args.ckpt + args.sr + [args.data]
    if args.lr_data:
        inputs.append(args.lr_data)
    files = [path for path in (args.json, args.csv) if path]
    for output in files + list(folders.values()):
        real = Path(os.path.realpath(output))
        for path in inputs:
            if real.is_relative_to(os.path.realpath(path)):
                raise InputError(f"{output} lies inside the input {path}; name another output")
    for file in files:
        if os.path.exists(file) and not os.path.isfile(file):
            raise InputError(f"{file} is not a file; choose another name")
        Path(file).parent.mkdir(parents=True, exist_ok=True)


def save_images(folders, stem, images, hr, scores):
    """Save each model's SR as <its folder>/<stem>.png, and beside it a sheet that compares all."""
    labels = []
    for model in images:
        values = [text for text in cells(scores[model]) if text != "-"]
        labels.append(f"{folders[model].name}\n{' / '.join(values)}")
    sheet = srgan.side_by_side(list(images.values()) + [hr], labels + ["HR"])

    files = {}
    for model, sr in images.items():
        files[folders[model] / f"{stem}.png"] = Image.fromarray(sr)
        files[folders[model].parent / "comparison" / f"{stem}.png"] = sheet
    for path, image in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with srgan.replacing(path) as temporary:
            image.save(temporary)


def cells(scores):
    """A text for each metric: "31.78" for a result of measure, "28.43 ± 3.70" for aggregate's."""
    row = []
    for name, metric in METRICS.items():
        score = scores[name]
        if score is None:
            row.append("-")
        elif isinstance(score, dict):
            row.append(f"{score['mean']:.{metric.digits}f} ± {score['std']:.{metric.digits}f}")
        else:
            row.append(f"{score:.{metric.digits}f}")
    return row


def report_models(models, results):
    """{model: mean and std of each metric, and under "images" the values of each image}."""
    report = {}
    for model in models:
        images = {}
        for stem, scores in results.items():
            images[stem] = scores[model]
        report[model] = srgan.aggregate(images.values())
        report[model]["images"] = images
    return report


def print_table(report, per_image):
    """Print a row for each model and, if asked for, one for each of its images below it."""
    table = [("", [metric.title for metric in METRICS.values()])]
    for model, scores in report.items():
        table.append((model, cells(scores)))
        if per_image:
            for stem, score in scores["images"].items():
                table.append((f"  {stem}", cells(score)))

    width = max(len(name) for name, _ in table)
    for name, row in table:
        print(f"{name:{width}}" + "".join(f"{text:>18}" for text in row))


def write_files(args, report):
    """Write the files that are asked for, and say which were written."""
    if args.json:
        srgan.write_json(args.json, report)
    if args.csv:
        write_csv(args.csv, report["models"])
    written = [path for path in (args.json, args.csv, args.save_images) if path]
    if written:
        print(f"wrote {', '.join(written)}")


def write_csv(path, report):
    """Write a row for each model and image."""
    rows = [["model", "image"] + list(METRICS)]
    for model, scores in report.items():
        for stem, score in scores["images"].items():
            rows.append([model, stem] + list(score.values()))
    with srgan.replacing(path) as temporary:
        # Names of files may hold bytes that are not UTF-8.
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    srgan.run(main)
