"""Measure generators on a test set by the usual protocol (paper, Sec. 3.1).

    python evaluate.py --ckpt runs/gan/checkpoint_latest.pth weights/srresnet.pth --data Set14
    python evaluate.py --sr results/other_program --data Set14

The table has one row each for nearest-neighbour and bicubic upscaling, every checkpoint and every
--sr folder: mean and standard deviation over the images. LR is made from HR unless it is given.
Exit status: 0; 1 if some images could not be measured; 2 for wrong usage or unusable input.
"""
import csv
import os
import re
import signal
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

if __name__ == "__main__":                       # Ctrl-C while torch loads
    signal.signal(signal.SIGINT, signal.SIG_DFL)
import srgan
from srgan import METRICS, Image, InputError, tqdm


def parse_args():
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", nargs="+", default=[], metavar="FILE", help="checkpoints of train.py")
    add("--sr", nargs="+", default=[], metavar="DIR", help="SR images, named like HR or HR_ending")
    add("--data", required=True, metavar="DIR", help="HR images, or HR/ and LR_bicubic_x4/")
    add("--lr", metavar="DIR", help="LR images made elsewhere, named like HR, HRx4 or HR_LR")
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
    if "" in [*vars(args).values(), *args.ckpt, *args.sr] or (args.shave or 0) < 0:
        parser.error("an argument is empty, or --shave is below 0")
    return args


def find_sr(folder, pairs):
    """{HR's stem: SR path}. SR names may share an ending. A path need not exist."""
    sr = srgan.by_stem(srgan.find_images(folder))
    hr = {stem.removesuffix("_HR"): stem for stem, *_ in pairs}
    endings = Counter(name[len(start):] for name in sr for start in hr if name.startswith(start))
    ending = min(endings, key=lambda end: (-endings[end], len(end)), default="")
    return {hr[name]: sr.get(name + ending, Path(folder, f"{name}{ending}.png")) for name in hr}


def make_models(generators, sr_folders, pairs, scale):
    """{name: function of LR and stem that gives SR}, one for each row of the table."""
    models = {m.name.lower(): lambda lr, stem, m=m: srgan.upsample(lr, scale, m)
              for m in (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)}
    rows = {path: lambda lr, stem, g=g: srgan.upscale(g, lr) for path, g in generators.items()}
    for folder in sr_folders:
        rows[folder] = lambda lr, stem, sr=find_sr(folder, pairs): srgan.open_rgb(sr[stem])
    return models | {f"./{name}" if name in models else name: row for name, row in rows.items()}


def image_folders(folder, models):
    """{model: its folder in `folder`, such as gan_checkpoint_best_psnr}; "" is for the sheets."""
    names = ["comparison"]
    for model in models:
        name = re.sub(r"[^\w-]+", "_", "/".join(Path(model).with_suffix("").parts[-2:])).strip("_")
        names.append(f"{name}_{len(names)}" if name in ("", *names) else name)
    return {model: Path(folder, name) for model, name in zip(["", *models], names)}


def check_outputs(outputs, folders, pairs, args):
    """Make the folders of the outputs. Raises InputError if an output would replace an input."""
    inputs = [*args.ckpt, *(path for _, *paths in pairs for path in paths if path),
              *(path for folder in args.sr for path in srgan.find_images(folder))]
    inputs = [Path(os.path.realpath(path)) for path in inputs]
    protected = {*inputs, *(folder for path in inputs for folder in path.parents)}
    images = [folder / f"{stem}.png" for folder in folders.values() for stem, *_ in pairs]
    for path in outputs + images:
        is_folder = os.path.isdir(path) and path != args.save_images
        if is_folder or Path(os.path.realpath(path)) in protected:
            raise InputError(f"{path} is a folder or an input, or holds one; name another output")
        Path(path).parent.mkdir(parents=True, exist_ok=True)


def measure_all(pairs, models, folders, scale, kernel, **protocol):
    """{stem: {model: srgan.measure's result}}; an image that fails is left out with a message."""
    results = {}
    for stem, *paths in tqdm(pairs, unit="image", leave=False, disable=None):
        try:
            lr, hr = srgan.open_pair(*paths, scale, kernel)
            images = {model: upscale(lr, stem) for model, upscale in models.items()}
            for model, sr in images.items():
                if sr.shape != hr.shape:
                    raise InputError(f"the image of {model} is not {hr.shape[1]}x{hr.shape[0]}")
            row = {model: srgan.measure(sr, hr, **protocol) for model, sr in images.items()}
            if folders:
                save_images(folders, stem, images, hr, row)
            results[stem] = row
        except InputError as error:
            names = tuple(map(str, paths))           # the message may begin with one of them
            srgan.say(error if str(error).startswith(names) else f"{stem}: {error}")
        except (MemoryError, RuntimeError) as error:
            if not srgan.is_out_of_memory(error):
                raise
            srgan.say(f"{stem}: out of memory")
    return results


def save_images(folders, stem, images, hr, scores):
    """Save each model's SR, and a sheet of all of them with HR, as <folder>/<stem>.png."""
    labels = [f"{folders[model].name}\n" + " / ".join(text for text in cells(scores[model])
                                                      if text != "-") for model in images]
    sheet = srgan.side_by_side([*images.values(), hr], [*labels, "HR"])
    images = {model: Image.fromarray(sr) for model, sr in images.items()} | {"": sheet}
    for model, folder in folders.items():
        with srgan.replacing(folder / f"{stem}.png") as temporary:
            images[model].save(temporary)


def cells(scores):
    """A result of srgan.measure or srgan.aggregate as text, one cell for each metric."""
    values = {name: x.values() if isinstance(x, dict) else [x] for name, x in scores.items()}
    return [" ± ".join("-" if x is None else f"{x:.{metric.digits}f}" for x in values[name])
            for name, metric in METRICS.items()]


def write(args, document):
    """Write the results to the JSON and CSV files asked for, and print them as a table."""
    table = [["", *(metric.title for metric in METRICS.values())]]
    rows = [["model", "image", *METRICS]]
    for model, scores in document["models"].items():
        table.append([model, *cells(scores)])
        for stem, score in scores["images"].items():
            rows.append([model, stem, *score.values()])
            if args.per_image:
                table.append([f"  {stem}", *cells(score)])
    if args.json:
        srgan.write_json(args.json, document)
    if args.csv:
        with srgan.replacing(args.csv) as path, \
                open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows(rows)
    width = max(len(name) for name, *_ in table)
    for name, *row in table:
        print(f"{name:{width}}" + "".join(f"{text:>18}" for text in row))


def main():
    args = parse_args()
    device = srgan.pick_device(args.device)
    state = srgan.load_checkpoint(args.ckpt[0]) if args.ckpt else {}
    config = state.get("config", {})
    generators = {path: srgan.optimize_for_inference(srgan.load_generator(path, device))
                  for path in args.ckpt}
    scales = {g.arch["scale"] for g in generators.values()} | {args.scale} - {None}
    if len(scales) > 1:
        raise InputError(f"the scales differ: {sorted(scales)}; measure one scale at a time")
    scale = min(scales, default=4)
    shave = scale if args.shave is None else args.shave
    kernel = args.kernel or config.get("kernel", "bicubic")
    pairs = srgan.find_pairs(args.data, args.lr, scale, kernel)
    if args.split and state.get("val"):
        raise InputError(f"{args.ckpt[0]} was trained with --val, which held out no part of --data")
    if args.split:                                   # as train.py made it
        parts = srgan.split(pairs, config.get("split", (80, 15, 5)), config.get("validate_on", 0))
        pairs = parts[args.split]
    models = make_models(generators, args.sr, pairs, scale)
    folders = image_folders(args.save_images, models) if args.save_images else {}
    outputs = [path for path in (args.json, args.csv, args.save_images) if path]
    check_outputs(outputs, folders, pairs, args)
    results = measure_all(pairs, models, folders, scale, kernel, shave=shave, luma=not args.rgb,
                          names=srgan.usable_metrics(not args.no_lpips, device))
    data = f"{args.data} ({args.split})" if args.split else args.data
    if not results:
        raise InputError(f"{data}: it has no images, or none could be measured")
    source = args.lr or ("LR images of the folder" if pairs[0][2] else f"{kernel} x1/{scale} of HR")
    protocol = {"channels": "RGB" if args.rgb else "Y", "shave": shave, "bits": 8, "lr": source}
    print(f"{data}: {len(results)} images, x{scale}, LR: {source}; PSNR and SSIM on "
          f"{protocol['channels']}, {shave} border pixels removed, 8 bits")
    report = {model: srgan.aggregate([row[model] for row in results.values()])
              | {"images": {stem: row[model] for stem, row in results.items()}} for model in models}
    write(args, {"data": args.data, "scale": scale, "protocol": protocol, "models": report})
    if outputs:
        print(f"wrote {', '.join(outputs)}")
    return 1 if len(results) < len(pairs) else 0


if __name__ == "__main__":
    srgan.run(main)
