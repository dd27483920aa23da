"""Measure generators on a test set by the protocol of the field: PSNR and SSIM on Y, a border of `scale` pixels removed, 8 bits.

    python evaluate.py --ckpt runs/gan/checkpoint_latest.pth weights/srresnet.pth --data Set14

DIR holds HR pictures, or HR/ and LR_bicubic_x4/. Without LR pictures they are made from the HR ones.
Prints mean and standard deviation over the pictures, for bicubic upscaling and for each checkpoint.
Exit status: 0; 1 where some pictures could not be measured; 2 for wrong usage or unusable input.
"""
import argparse
import csv
import json
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm

import srgan
from srgan import InputError


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", nargs="*", default=[], metavar="FILE", help="checkpoints of train.py (none: bicubic alone)")
    parser.add_argument("--data", required=True, metavar="DIR", help="HR pictures, or HR/ and LR_bicubic_x4/")
    parser.add_argument("--lr", metavar="DIR", help="LR pictures made elsewhere, of the same names, or ending in x4 or _LR")
    parser.add_argument("--split", choices=("train", "val", "test"), help="only this part of DIR, the folder that training had as its "
                        "one --data, by the shares of the first checkpoint (default: 80/15/5)")
    parser.add_argument("--scale", type=int, choices=srgan.SCALES, help="default: the checkpoints', else 4")
    parser.add_argument("--kernel", choices=("bicubic", "gaussian"), help="how LR is made where it is not given (default: as the first "
                        "checkpoint was trained, else bicubic)")
    parser.add_argument("--rgb", action="store_true", help="measure on RGB instead of Y")
    parser.add_argument("--shave", type=int, metavar="N", help="border pixels to leave out (default: scale)")
    parser.add_argument("--no-lpips", action="store_true", help="leave LPIPS out, which downloads AlexNet on first use")
    parser.add_argument("--per-image", action="store_true", help="a row for each picture, too")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    parser.add_argument("--csv", metavar="FILE", help="write a row for each model and picture")
    parser.add_argument("--save-images", metavar="DIR", help="write the SR pictures, and comparisons with bicubic and HR")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.shave is not None and args.shave < 0:
        parser.error("--shave must be 0 or above")
    return args


def cells(metrics):
    """The three metrics as table cells: single values of a picture, or mean and standard deviation of a model."""
    text = []
    for name, digits in (("psnr", 2), ("ssim", 4), ("lpips", 4)):
        value = metrics[name]
        if isinstance(value, dict):
            text.append(f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f}")
        else:
            text.append("-" if value is None else f"{value:.{digits}f}")
    return "".join(f"{cell:>18s}" for cell in text)


def finite(value):
    """A document for JSON, which knows no infinity: the PSNR of identical pictures becomes null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_pictures(folder, names, stem, pictures, hr, scores):
    """Each model's SR as <folder>/<model>/<stem>.png, and all of them beside HR as <folder>/comparison/<stem>.png."""
    sheet = srgan.strip([*pictures, hr], [f"{name}\n{score['psnr']:.2f} dB / {score['ssim']:.4f}"
                                          for name, score in zip(names, scores)] + ["HR"])
    for name, picture in [*zip(names, map(srgan.Image.fromarray, pictures)), ("comparison", sheet)]:
        path = Path(folder) / name / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        with srgan.replacing(path) as temporary:
            picture.save(temporary)


def check_outputs(args, pairs):
    """Raise InputError where a result would take the place of an input, or has no folder."""
    inputs = srgan.real_paths(pairs, *args.ckpt)
    for path in filter(None, (args.json, args.csv)):
        if os.path.realpath(path) in inputs:
            raise InputError(f"{path} is an input, which is never overwritten; name another output")
        if not Path(path).parent.is_dir():
            raise InputError(f"{Path(path).parent}: no such folder")
    folder = args.save_images and os.path.realpath(args.save_images) + os.sep
    if folder and any(path.startswith(folder) for path in inputs):
        raise InputError(f"{args.save_images} holds inputs; name another folder for the pictures")


def main():
    args = parse_args()
    device = srgan.pick_device(args.device)
    state = srgan.load_checkpoint(args.ckpt[0]) if args.ckpt else {}
    config = state.get("config") if isinstance(state.get("config"), dict) else {}
    kernel = args.kernel or ("gaussian" if config.get("kernel") == "gaussian" else "bicubic")
    generators = {path: srgan.optimize_for_inference(srgan.load_generator(path, device)) for path in args.ckpt}
    scales = {g.arch["scale"] for g in generators.values()} | ({args.scale} if args.scale else set())
    if len(scales) > 1:
        raise InputError(f"one table is of one scale, not of {sorted(scales)}")
    scale = scales.pop() if scales else 4
    shave = scale if args.shave is None else args.shave
    pairs = srgan.find_pairs(args.data, args.lr, scale, kernel)
    if args.split:
        if isinstance(state.get("val"), str) and state["val"]:
            raise InputError(f"{args.ckpt[0]} was trained with --val {state['val']}: no part of its data was held out")
        try:
            parts = srgan.split([hr for _, hr, _ in pairs], config.get("split", (80, 15, 5)), config.get("validate_on", 0))
        except (TypeError, ValueError):
            raise InputError(f"{args.ckpt[0]}: its configuration's split is none") from None
        chosen = set(parts[args.split])
        pairs = [pair for pair in pairs if pair[1] in chosen]
        if not pairs:
            raise InputError(f"{args.data}: the {args.split} part is empty")
    check_outputs(args, pairs)
    lpips, failed = None if args.no_lpips else srgan.try_lpips(device), 0

    models = ["bicubic", *generators]
    folders = ["bicubic"]
    for path in generators:  # such as gan_checkpoint_best_psnr
        name = "_".join(Path(path).with_suffix("").parts[-2:]).strip("/\\")
        folders.append(name if name not in (*folders, "comparison") else f"{name}_{len(folders) + 1}")
    scores = {model: {} for model in models}
    for stem, hr_path, lr_path in tqdm(pairs, unit="picture", leave=False, disable=not sys.stderr.isatty()):
        try:
            lr, hr = srgan.open_pair(hr_path, lr_path, scale, kernel)
            pictures = [srgan.bicubic(lr, scale)] + [srgan.upscale(g, lr) for g in generators.values()]
            row = [srgan.measure(sr, hr, shave, not args.rgb, lpips) for sr in pictures]
        except (ValueError, MemoryError, RuntimeError) as error:  # unreadable, smaller than what the metrics need, or too large
            too_large = srgan.is_out_of_memory(error)
            if isinstance(error, RuntimeError) and not too_large:
                raise
            srgan.say(f"{stem}: {'out of memory' if too_large else error}")
            failed += 1
            continue
        for model, score in zip(models, row):
            scores[model][stem] = score
        if args.save_images:
            save_pictures(args.save_images, folders, stem, pictures, hr, row)
    if failed == len(pairs):
        raise InputError(f"{args.data}: no picture could be measured")

    lr_source = args.lr or ("LR pictures of the folder" if pairs[0][2] else f"{kernel} x1/{scale} of HR")
    name, channels = args.data + (f" ({args.split})" if args.split else ""), "RGB" if args.rgb else "Y"
    print(f"{name}: {len(pairs) - failed} pictures, x{scale}, LR: {lr_source}; PSNR and SSIM on {channels}, "
          f"{shave} border pixels removed, 8 bits")
    result = {model: {**srgan.aggregate(list(rows.values())), "images": rows} for model, rows in scores.items()}
    width = max(len(name) for name in [*models, *(["  " + stem for stem in scores["bicubic"]] if args.per_image else [])]) + 2
    print(f"{'':{width}s}{'PSNR (dB)':>18s}{'SSIM':>18s}{'LPIPS':>18s}")
    for model in models:
        print(f"{model:{width}s}{cells(result[model])}")
        for stem, score in result[model]["images"].items() if args.per_image else ():
            print(f"{'  ' + stem:{width}s}{cells(score)}")

    if args.json:
        protocol = {"channels": channels, "shave": shave, "bits": 8, "lr": lr_source}
        document = {"data": args.data, "scale": scale, "protocol": protocol, "models": result}
        srgan.replacing_text(args.json, json.dumps(finite(document), indent=2) + "\n")
    if args.csv:
        with srgan.replacing(args.csv) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["model", "image", "psnr", "ssim", "lpips"])
            writer.writerows([model, stem, *score.values()] for model in models for stem, score in scores[model].items())
    return 1 if failed else 0


if __name__ == "__main__":
    srgan.run(main)
