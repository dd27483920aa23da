"""What the README says is so. The paper's facts stand here, independent of README and code."""
import importlib.util
import inspect
import json
import re

import pytest
import torch
from conftest import ROOT, photo
from PIL import Image

import srgan
import train

README = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
TRAINING = (ROOT / "docs/TRAINING.md").read_text(encoding="utf-8")
CONFIG = json.loads((ROOT / "config.json").read_text(encoding="utf-8"))
EQUATIONS = {  # words of its row; the line of code with its number, and the function it stands in
    1: ("what G minimises", "minimize(l_sr, adam_G)", "srgan_step"),
    2: ("min-max game", "loss = d_loss(real, fake)", "discriminator_step"),
    3: ("plus 10^-3 adversarial", "l_x + weight * l_gen", "perceptual_loss"),
    4: ("pixel MSE", "(hr - sr).square().mean()", "mse_loss"),
    5: ("VGG19's feature maps", "(phi(hr) - phi(sr)).square().mean()", "content_loss"),
    6: ("adversarial loss", "-F.logsigmoid(D(sr)).mean()", "adversarial_loss"),
}


def section(title, page=README):
    return re.search(rf"^## {title}$(.*?)(?=^## |\Z)", page, re.M | re.S)[1]


def table(title, head="", page=README):
    """The rows of the section's table whose head begins with `head`, as lists of cells."""
    text = section(title, page)
    text = text[text.index(f"| {head}"):].split("\n\n")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]


def functions(text):
    """{name: object} of each `srgan.X` and `train.X` in a text."""
    names = re.findall(r"`((?:srgan|train)\.(?!py`|pth`)[\w.]+)`", text)
    return {name: eval(name, {"srgan": srgan, "train": train}) for name in names}


@pytest.mark.parametrize("number", EQUATIONS)
def test_each_equation_is_a_line_of_code_where_the_table_says(number):
    words, formula, function = EQUATIONS[number]
    what, where = {row[0]: row[1:] for row in table("How to read this code", "paper")}[f"Eq. {number}"]
    sources = {name.split(".")[-1]: inspect.getsource(f) for name, f in functions(where).items()}
    assert words in what and any(formula in line and re.search(rf"# .*Eq\. {number}\b", line)
                                 for line in sources[function].splitlines())
    assert all(f"Eq. {number}" in source for source in sources.values())


def test_the_functions_settings_and_options_that_the_readme_names_exist():
    assert all(callable(thing) for thing in functions(README).values())
    args = ["--data", "x", "--stage", "gan"]
    for change in re.findall(r"(?:`|--set )([a-z_.]+=[^`\s]+)`", README):
        args += ["--set", change]                                # refused where it does not exist
    assert len(args) > 20 and train.resolve_settings(train.parse_args(args))
    names = re.findall(r"`(.*?)`", "".join(row[0] for row in table("Train", "setting")))
    assert len(names) >= 12 and {*names} <= train.flatten(CONFIG["settings"]).keys()
    code = {path.stem: path.read_text("utf-8") for path in ROOT.glob("*.py")}
    for script, rest in re.findall(r"(\w+)\.py ([^`#\n]*)", README.replace(" --help", "")):
        assert all(f'"{name}"' in code[script] for name in re.findall(r"(?<!\S)--[a-z-]+", rest))
    assert all(f'"{name}"' in str(code) for name in re.findall(r"`(--[\w-]+)", README))


def test_every_preset_is_described_and_strict_undoes_the_first_five_departures():
    presets = re.findall(r"`(.*?)`", "".join(row[1] for row in table("Presets", "source | preset", TRAINING)))
    assert sorted(presets) == sorted(CONFIG["presets"])
    assert CONFIG["presets"].keys() >= {*re.findall(r"--preset ([a-z][\w-]+)", README)}
    rows = table("Where it departs from the paper")[:5]
    assert dict(re.findall(r"`(\w+)=(\w+)`", str(rows))) == {
        name: json.dumps(value).strip('"').removesuffix(".0")
        for name, value in CONFIG["presets"]["strict"]["changes"].items()}


@pytest.mark.parametrize("page", ["README.md", "weights/README.md", "docs/TRAINING.md"])
def test_links_to_files_resolve(page):
    text, folder = (ROOT / page).read_text("utf-8"), (ROOT / page).parent
    links = [folder / link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    links += [ROOT / name for name in re.findall(r"`((?:weights|tests)/\w+\.\w+)`", text)]
    assert [link for link in links if not link.exists()] == []


def test_the_library_example_runs_and_what_it_exports_computes_the_same(
        double, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").mkdir()
    Image.fromarray(photo(12, 16)).save("samples/raccoon.png")
    code, here = section("As a library").split("```python\n")[1].split("```")[0], {}
    example, recipe = code.split("\n\n")
    exec(example.replace("weights/", f"{(ROOT / 'weights').as_posix()}/"), here)
    assert here["sr"].shape == (48, 64, 3) and Image.open("out.png").size == (64, 48)
    here["generator"] = srgan.optimize_for_inference(srgan.Generator(channels=8, n_blocks=1))
    exec(recipe if importlib.util.find_spec("onnxscript") else recipe.split("torch.onnx")[0], here)
    exported, lr = torch.export.load("srgan.pt2").module(), torch.rand(1, 3, 9, 17)
    expected = here["generator"](lr)
    assert (exported(lr) - expected).abs().max() <= 1e-9 * expected.abs().max()
