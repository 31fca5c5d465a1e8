"""What holds for the repository as a whole, read from its files."""

import ast
import json
import re
import sys
from dataclasses import fields
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from options import Options

ROOT = Path(__file__).parent.parent
MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
NOTEBOOKS = sorted(ROOT.glob("*.ipynb"))

# Who may import whom. What is not listed imports no module of this project.
MAY_IMPORT = {
    "data_loader": {"vocabulary"},
    "engine": {"data_loader", "distributed", "metrics", "vocabulary"},
    "features": {"checkpoint", "data_loader", "distributed", "model"},
    "splits": {"data_loader", "download", "sample_data"},
    "pretrain_sample": {"checkpoint", "sample_data"},
    "train": {
        "checkpoint", "data_loader", "distributed", "engine", "features", "metrics", "model",
        "options", "vocabulary",
    },
}  # fmt: skip

# Where the name to install differs from the name to import.
INSTALLED_AS = {"PIL": "pillow", "nbformat": "jupyter", "nbclient": "jupyter", "yaml": "pyyaml"}


def imports(source):
    """The top-level names of all modules that a source imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the modules lie side by side: no relative imports"
            names.add(node.module.split(".")[0])
    return names


def code_cells(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def code_of(notebook):
    """The code of a notebook, without IPython's own commands."""
    lines = "\n".join("".join(cell["source"]) for cell in code_cells(notebook)).split("\n")
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def sources():
    for path in [*MODULES.values(), *(ROOT / "tests").glob("*.py")]:
        yield path.read_text(encoding="utf-8")
    for notebook in NOTEBOOKS:
        yield code_of(notebook)


@pytest.mark.parametrize("module", MODULES)
def test_import_graph(module):
    """A module imports only those below it."""
    imported = imports(MODULES[module].read_text(encoding="utf-8")) & MODULES.keys()
    assert imported <= MAY_IMPORT.get(module, set())


def test_import_graph_has_no_cycle():
    """The graph above is one of levels: every module can be read after those it imports."""
    assert set(TopologicalSorter(MAY_IMPORT).static_order()) <= MODULES.keys()


def test_model_needs_torch_alone():
    """model.py can be taken away and used with torch and torchvision, and the Pillow they need."""
    foreign = imports(MODULES["model"].read_text(encoding="utf-8")) - sys.stdlib_module_names
    assert foreign == {"torch", "torchvision", "PIL"}


def test_download_needs_python_alone():
    """download.py needs nothing but Python, and tqdm for its progress bar."""
    foreign = imports(MODULES["download"].read_text(encoding="utf-8")) - sys.stdlib_module_names
    assert foreign == {"tqdm"}


def test_requirements():
    """requirements.txt names every package that the project imports, and no module twice."""
    text = (ROOT / "requirements.txt").read_text()
    required = [m.lower() for m in re.findall(r"^[A-Za-z0-9_-]+", text, re.MULTILINE)]
    assert len(set(required)) == len(required)
    own = MODULES.keys() | {path.stem for path in (ROOT / "tests").glob("*.py")}
    used = set().union(*map(imports, sources())) - own - sys.stdlib_module_names
    assert {INSTALLED_AS.get(name, name) for name in used} <= set(required)


def test_no_star_imports():
    """Every name in a source can be traced to where it comes from."""
    for source in sources():
        assert not re.search(r"^\s*from \S+ import \*", source, re.MULTILINE)


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_is(module):
    """A module begins with a docstring."""
    assert ast.get_docstring(ast.parse(MODULES[module].read_text(encoding="utf-8")))


@pytest.mark.parametrize("test", sorted((ROOT / "tests").glob("test_*.py")), ids=lambda p: p.stem)
def test_tests_say_what_holds(test):
    """Every test's docstring is a sentence."""
    for node in ast.walk(ast.parse(test.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            sentence = ast.get_docstring(node) or ""
            assert sentence.split("\n\n")[0].endswith("."), node.name


# ---------------------------------------------------------------------------- README

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_names_every_module():
    """The README's table of files has every module and notebook, and nothing that is not there."""
    table = README.split("## The files")[1].split("\n## ")[0]
    named = set(re.findall(r"`([\w/]+\.\w+)`", table))
    assert {name for name in named if not (ROOT / name).exists()} == set()
    assert {f"{name}.py" for name in MODULES} <= named


def test_readme_options():
    """Every option in the README's train.py commands, and in its prose, exists."""
    known = {f"--{field.name.replace('_', '-')}" for field in fields(Options)} | {"--help"}
    commands = re.findall(r"train\.py((?:[^\n`]*\\\n)*[^\n`]*)", README)
    assert len(commands) > 5
    assert set(re.findall(r"--[a-z][a-z-]+", " ".join(commands))) <= known
    prose = set(re.findall(r"`(--[a-z][a-z-]+)[^`]*`", README))
    assert prose - known <= {"--coco", "--max-restarts"}  # of the benchmark, of torchrun


def test_readme_links():
    """Every file that the README links to is there."""
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


# ---------------------------------------------------------------------------- notebooks

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_notebook_ran_from_top_to_bottom(notebook):
    """Its cells were executed once, in order: they count 1, 2, 3 and so on."""
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


@each_notebook
def test_notebook_outputs_are_clean(notebook):
    """No output is an error or a warning, or shows a path of the machine it ran on."""
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr"
            shown = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
            text = json.dumps([output.get("text", ""), shown])
            assert not re.search(r"(?<![\w.:/])/(home|root|tmp|Users|mnt|opt|usr)/", text)
            assert str(ROOT) not in text
            assert "application/vnd.jupyter.widget-view+json" not in shown


@each_notebook
def test_notebook_code_is_whole(notebook):
    """Its code parses as Python once IPython's commands are left out."""
    ast.parse(code_of(notebook))
