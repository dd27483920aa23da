"""What the README says about the code is so."""
import inspect
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import evaluate
import srgan
import train
import upscale

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAPER = re.search(r"## From the paper to the code\n\n(.*?)\n\n", README, re.S)[1].splitlines()[2:]


@pytest.mark.parametrize("row", PAPER, ids=lambda row: row.split("|")[1].strip() + row.split("|")[3].strip())
def test_what_the_paper_defines_is_where_the_table_says(row):
    """... and says so there: the docstring, source or section banner names the equation, figure or section."""
    _, source, _, where, _ = (cell.strip() for cell in row.split("|"))
    modules = {"srgan": srgan, "train": train, "evaluate": evaluate}
    names = [name for name in re.findall(r"`(\w+)\.(\w+)`", where) if name[1] != "json"]
    for module, name in names:
        assert hasattr(modules[module], name), name
    for name in re.findall(r"function `(\w+)`", where):
        assert f"def {name}(" in inspect.getsource(train.main)
    if source.startswith("Eq."):
        def text(module, name):
            thing, whole = getattr(modules[module], name), inspect.getsource(modules[module])
            return inspect.getsource(thing) if callable(thing) else re.search(rf"^{name} = .*", whole, re.M)[0]
        assert any(re.search(rf"Eq\. (\d+ and |\d to )?{source[4:]}\b", text(*name)) for name in names), source


def test_every_equation_of_the_paper_is_in_the_table():
    assert {f"Eq. {n}" for n in range(1, 7)} <= {row.split("|")[1].strip() for row in PAPER}


def test_options_and_presets_that_the_readme_names_exist():
    scripts = {name: subprocess.run([sys.executable, ROOT / f"{name}.py", "--help"], capture_output=True, text=True).stdout
               for name in ("train", "evaluate", "upscale")}
    for line in re.findall(r"^(?:python|torchrun .*?) ?(\w+)\.py(.*)$", README, re.M):
        script, rest = line
        for option in re.findall(r"--[a-z-]+", rest.split("#")[0]):
            assert script not in scripts or option in scripts[script], line
    presets = json.loads((ROOT / "config.json").read_text())["presets"]
    table = README[README.index("| source | preset |"):README.index("| | settings")]
    assert set(re.findall(r"^\|[^|]*\|([^|]*)\|", table, re.M)) and {
        name for cell in re.findall(r"^\|[^|]*\|([^|]*)\|", table, re.M)[2:] for name in re.findall(r"`([\w-]+)`", cell)} == set(presets)


@pytest.mark.parametrize("module", [srgan, train, evaluate, upscale])
def test_every_public_function_is_documented_or_says_it_in_its_name(module):
    """Equation, shapes or errors stand in the docstring; only functions of one or two lines do without."""
    for name, thing in vars(module).items():
        if inspect.isfunction(thing) and thing.__module__ == module.__name__ and not name.startswith("_"):
            assert thing.__doc__ or len(inspect.getsource(thing).splitlines()) <= 8 or name in ("main", "parse_args"), name
