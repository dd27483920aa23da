"""Measure generators on a test set by the protocol of the field (paper, Sec. 3.1).

    python evaluate.py --ckpt runs/gan/checkpoint_latest.pth weights/srresnet.pth --data Set14
    python evaluate.py --sr results/other_program --data Set14

Each row of the table is mean and standard deviation over the images: nearest and bicubic
upscaling, the checkpoints of --ckpt, the folders of --sr. LR is made from HR where it is missing.
Exit status: 0; 1 where some images could not be measured; 2 for wrong usage or unusable input.
"""
import csv
import os
import re
import signal
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from functools import partial
from pathlib import Path

if __name__ == "__main__":                       # Ctrl-C while torch is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import srgan
from srgan import METRICS, Image, InputError, tqdm


def parse_args():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", nargs="+", default=[], metavar="FILE", help="checkpoints of train.py")
    add("--sr", nargs="+", default=[], metavar="DIR", help="SR images, named as HR or HR_ending")
    add("--data", required=True, metavar="DIR", help="HR images, or HR/ and LR_bicubic_x4/")
    add("--lr", metavar="DIR", help="LR images made elsewhere, named as HR, or ending in x4, _LR")
    add("--split", choices=("train", "val", "test"),
        help="only this part of --data, as --ckpt's training divided it (without: 80/15/5)")
    add("--scale", type=int, choices=srgan.SCALES, help="default: the checkpoints', else 4")
    add("--kernel", choices=srgan.KERNELS, help="how LR is made (default: as --ckpt was trained)")
    add("--rgb", action="store_true", help="measure on RGB instead of Y")
    add("--shave", type=int, metavar="N", help="border pixels to leave out (default: scale)")
    add("--no-lpips", action="store_true", help="without LPIPS, which downloads AlexNet once")
    add("--per-image", action="store_true", help="a row for each image, too")
    add("--json", metavar="FILE", help="write everything measured")
    add("--csv", metavar="FILE", help="write a row for each model and image")
    add("--save-images", metavar="DIR", help="write all SR images, and sheets that compare them")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    args = parser.parse_args()
    if "" in [*vars(args).values(), *args.ckpt, *args.sr] or (args.shave or 0) < 0:
        parser.error("an argument is empty, or --shave below 0")
    return args


def select(pairs, part, config):
    """The pairs in one part of the split that training made by this configuration."""
    shares, validate_on = config.get("split", [80, 15, 5]), config.get("validate_on", 0)
    if type(shares) is not list or [type(n) for n in (*shares, validate_on)] != [int] * 4:
        raise InputError("the first checkpoint has no valid split; leave --split out")
    return srgan.split(pairs, shares, validate_on)[part]


def find_sr(folder, pairs):
    """{stem: SR path}, by names as for LR; all SR may have one more ending. A path may not exist"""
    sr = srgan.by_stem(srgan.find_images(folder))
    hr = {path.stem.removesuffix("_HR"): path for _, path, _ in pairs}
    endings = Counter(name[len(start):] for name in sr for start in hr if name.startswith(start))
    ending = min(endings, key=lambda end: (-endings[end], len(end)), default="")
    return {path.stem: sr.get(name + ending, Path(folder, f"{name}{ending}.png"))
            for name, path in hr.items()}


def make_models(generators, sr_folders, pairs, scale):
    """{name: function of LR and stem that gives SR}, one for each row of the table."""
    rows = [(path, lambda lr, stem, g=g: srgan.upscale(g, lr)) for path, g in generators.items()]
    rows += [(folder, lambda lr, stem, found=find_sr(folder, pairs): srgan.open_rgb(found[stem]))
             for folder in sr_folders]
    models = {m.name.lower(): lambda lr, stem, m=m: srgan.upsample(lr, scale, m)
              for m in (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)}
    return models | {f"./{name}" if name in models else name: row for name, row in rows}


def image_folders(folder, models):
    """{model: its own folder under `folder`}, such as gan_checkpoint_best_psnr; "" for sheets."""
    names = ["comparison"]
    for model in models:
        name = re.sub(r"[^\w-]+", "_", "/".join(Path(model).with_suffix("").parts[-2:])).strip("_")
        names.append(f"{name}_{len(names)}" if name in ("", *names) else name)
    return {model: Path(folder, name) for model, name in zip(["", *models], names)}


def check_outputs(outputs, folders, pairs, args):
    """Raise InputError where a result would take an input's place. Makes the outputs' folders."""
    inputs = [*args.ckpt, *(path for _, *paths in pairs for path in paths if path),
              *(path for folder in args.sr for path in srgan.find_images(folder))]
    protected = {p for x in map(Path, map(os.path.realpath, inputs)) for p in (x, *x.parents)}
    for path in outputs + [Path(f, f"{stem}.png") for f in folders.values() for stem, *_ in pairs]:
        taken = os.path.isdir(path) and path != args.save_images
        if taken or Path(os.path.realpath(path)) in protected:
            raise InputError(f"{path} is a folder or an input, or holds one; name another output")
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def measure_all(pairs, models, open_pair, measure, folders):
    """{stem: {model: measure's result}}; an image that fails is left out with a line."""
    results = {}
    for stem, *paths in tqdm(pairs, unit="image", leave=False, disable=None):
        try:
            lr, hr = open_pair(*paths)
            images = {model: upscale(lr, stem) for model, upscale in models.items()}
            for model, sr in images.items():
                if sr.shape != hr.shape:
                    raise InputError(f"the image of {model} is not {hr.shape[1]}x{hr.shape[0]}")
            row = {model: measure(sr, hr) for model, sr in images.items()}
            if folders:
                save_images(folders, stem, images, hr, row)
            results[stem] = row
        except (InputError, MemoryError, RuntimeError) as error:
            if not isinstance(error, InputError) and not srgan.is_out_of_memory(error):
                raise
            srgan.say(f"{stem}: {error if isinstance(error, InputError) else 'out of memory'}")
    return results


def save_images(folders, stem, images, hr, scores):
    """Each model's SR, and the sheet of all of them beside HR, as <folder>/<stem>.png."""
    labels = [f"{folders[model].name}\n" + " / ".join(text for text in cells(scores[model])
                                                      if text != "-") for model in images]
    sheet = srgan.side_by_side([*images.values(), hr], [*labels, "HR"])
    images = {model: Image.fromarray(sr) for model, sr in images.items()} | {"": sheet}
    for model, folder in folders.items():
        with srgan.replacing(folder / f"{stem}.png") as temporary:
            images[model].save(temporary)


def cells(scores):
    """A result of srgan.measure or srgan.aggregate as text, one cell for each metric."""
    values = [(scores[name], metric.digits) for name, metric in METRICS.items()]
    values = [(x.values() if isinstance(x, dict) else [x], digits) for x, digits in values]
    return [" ± ".join("-" if x is None else f"{x:.{n}f}" for x in xs) for xs, n in values]


def write(args, document):
    """Write the document as JSON and its values as CSV, if wanted, and print it as a table."""
    table = [["", *(metric.title for metric in METRICS.values())]]
    rows = [["model", "image", *METRICS]]
    for model, scores in document["models"].items():
        table.append([model, *cells(scores)])
        for stem, score in scores["images"].items():
            rows.append([model, stem, *score.values()])
            table += [[f"  {stem}", *cells(score)]] * args.per_image
    if args.json:
        srgan.write_json(args.json, document)
    if args.csv:
        with srgan.replacing(args.csv) as path, \
                open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows(rows)
    width = max(len(name) for name, *_ in table)
    for name, *row in table:
        print(srgan.printable(f"{name:{width}}" + "".join(f"{text:>18}" for text in row)))


def main():
    args = parse_args()
    device = srgan.pick_device(args.device)
    state = srgan.load_checkpoint(args.ckpt[0]) if args.ckpt else {}
    config = state.get("config") if isinstance(state.get("config"), dict) else {}
    generators = {path: srgan.optimize_for_inference(srgan.load_generator(path, device))
                  for path in args.ckpt}
    scales = {g.arch["scale"] for g in generators.values()} | {args.scale} - {None}
    if len(scales) > 1:
        raise InputError(f"one table is of one scale, not of {sorted(scales)}")
    scale = min(scales, default=4)
    shave, channels = scale if args.shave is None else args.shave, "RGB" if args.rgb else "Y"
    kernel = args.kernel or next((k for k in srgan.KERNELS if k == config.get("kernel")), "bicubic")
    pairs = srgan.find_pairs(args.data, args.lr, scale, kernel)
    if args.split and isinstance(state.get("val"), str) and state["val"]:
        raise InputError(f"{args.ckpt[0]} had a --val, so it held out no part of its --data")
    pairs = select(pairs, args.split, config) if args.split else pairs
    models = make_models(generators, args.sr, pairs, scale)
    folders = image_folders(args.save_images, models) if args.save_images else {}
    outputs = [path for path in (args.json, args.csv, args.save_images) if path]
    check_outputs(outputs, folders, pairs, args)
    names = srgan.usable_metrics(not args.no_lpips, device)
    results = measure_all(pairs, models, partial(srgan.open_pair, scale=scale, kernel=kernel),
                          partial(srgan.measure, names=names, shave=shave, luma=not args.rgb),
                          folders)
    data = f"{args.data} ({args.split})" if args.split else args.data
    if not results:
        raise InputError(f"{data}: no image could be measured")
    source = args.lr or ("LR images of the folder" if pairs[0][2] else f"{kernel} x1/{scale} of HR")
    print(srgan.printable(f"{data}: {len(results)} images, x{scale}, LR: {source}; PSNR and SSIM "
                          f"on {channels}, {shave} border pixels removed, 8 bits"))
    protocol = {"channels": channels, "shave": shave, "bits": 8, "lr": source}
    report = {model: srgan.aggregate([row[model] for row in results.values()])
              | {"images": {stem: row[model] for stem, row in results.items()}} for model in models}
    write(args, {"data": args.data, "scale": scale, "protocol": protocol, "models": report})
    if outputs:
        print(srgan.printable(f"wrote {', '.join(outputs)}"))
    return int(len(results) < len(pairs))


if __name__ == "__main__":
    srgan.run(main)
