"""The repository as a whole, read from its files: imports, requirements, README, notebooks."""

import ast
import importlib
import json
import random
import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from captioning.learning.options import TrainConfig

ROOT = Path(__file__).parent.parent
MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
PROGRAMS = sorted([*ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")])
TESTS = sorted(ROOT.glob("tests/*.py"))
NOTEBOOKS = sorted(ROOT.glob("*.ipynb"))

# Who may import whom. A module imports only those above it in this list.
MAY_IMPORT = {
    "distributed": {},
    "files": {},
    "guard": {},
    "images": {},
    "layers": {},
    "metrics": {},
    "rasterize": {},
    "plots": {"images"},
    "synthetic": {"rasterize"},
    "mistakes": {"synthetic"},
    "card": {"synthetic"},
    "checkpoint": {"card", "distributed", "files"},
    "coco": {"files"},
    "download": {"files"},
    "vocabulary": {"files"},
    "backbones": {"checkpoint"},
    "config": {"checkpoint", "distributed"},
    "decoding": {"vocabulary"},
    "attention": {"decoding", "layers", "vocabulary"},
    "diagrams": {"attention", "backbones", "config", "plots"},
    "rewards": {"vocabulary"},
    "data_loader": {"coco", "files", "vocabulary"},
    "splits": {"coco", "download", "synthetic"},
    "last_stage": {"backbones"},
    "encoder": {"backbones", "config", "last_stage", "layers"},
    "model": {
        "attention",
        "backbones",
        "card",
        "checkpoint",
        "config",
        "decoding",
        "distributed",
        "encoder",
        "images",
        "layers",
        "vocabulary",
    },
    "describe": {"decoding", "images"},
    "app": {"describe", "guard", "images", "model"},
    "losses": {"decoding", "layers", "vocabulary"},
    "constraints": {"metrics", "vocabulary"},
    "ensemble": {"decoding", "layers", "losses", "model"},
    "features": {"backbones", "data_loader", "distributed", "files", "images"},
    "evaluate": {
        "coco",
        "constraints",
        "data_loader",
        "decoding",
        "distributed",
        "ensemble",
        "features",
        "files",
        "images",
        "layers",
        "losses",
        "metrics",
        "model",
        "vocabulary",
    },
    "caption": {"coco", "distributed", "evaluate", "images", "model", "plots"},
    "run": {
        "backbones",
        "card",
        "checkpoint",
        "coco",
        "config",
        "data_loader",
        "distributed",
        "features",
        "images",
        "losses",
        "model",
        "rewards",
        "vocabulary",
    },
    "train": {
        "checkpoint",
        "config",
        "distributed",
        "evaluate",
        "files",
        "metrics",
        "model",
        "run",
    },
}
NEEDS = {
    "download": {"tqdm"},
    "decoding": {"torch"},
    "model": {"torch", "PIL"},
    "guard": set(),
    "metrics": {"pycocoevalcap"},
}

# Where the name to install differs from the name to import.
INSTALLED_AS = {
    "PIL": "pillow",
    "nbformat": "jupyter",
    "nbclient": "jupyter",
    "starlette": "gradio",
}


def code_cells(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def syntax_tree(path):
    """The syntax tree of a Python file or of a notebook without IPython's own commands."""
    if path.suffix == ".py":
        return ast.parse(path.read_text(encoding="utf-8"))
    lines = "\n".join("".join(cell["source"]) for cell in code_cells(path)).split("\n")
    return ast.parse("\n".join(x for x in lines if not x.lstrip().startswith(("%", "!"))))


def imports(path):
    """{module: names imported from it} for all imports of a file, wherever in it they are."""
    found = {}
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.name.split(".")[0], set())
        if isinstance(node, ast.ImportFrom):
            names = found.setdefault(node.module.split(".")[0], set())
            if node.module in MODULES:
                names.update(alias.name for alias in node.names)
    return found


# ---------------------------------------------------------------------------- modules


def test_import_graph():
    """Every module imports only modules that it may import, and there is no cycle."""
    assert set(MAY_IMPORT) == set(MODULES)
    for index, (module, allowed) in enumerate(MAY_IMPORT.items()):
        assert set(allowed) <= set(list(MAY_IMPORT)[:index]), f"{module} is too high in the list"
        assert imports(MODULES[module]).keys() & MODULES.keys() <= set(allowed), module


@pytest.mark.parametrize("module", NEEDS)
def test_packages_of_a_module(module):
    """Some modules can be used elsewhere, because they need hardly any packages."""
    needed = imports(MODULES[module]).keys() - sys.stdlib_module_names - MODULES.keys()
    assert needed == NEEDS[module]


@pytest.mark.parametrize("path", [*PROGRAMS, *TESTS, *NOTEBOOKS], ids=lambda path: path.name)
def test_imported_names_exist(path):
    """Notebooks, scripts, benchmarks and tests import names that the modules have."""
    for module, names in imports(path).items():
        if module in MODULES:
            missing = [n for n in names if not hasattr(importlib.import_module(module), n)]
            assert missing == [], module


@pytest.mark.parametrize("module", MODULES)
def test_length(module):
    """A module has at most 320 lines."""
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 320


def test_requirements():
    """The requirements list every package that the project imports, each once."""
    text = "\n".join(path.read_text() for path in sorted(ROOT.glob("requirements*.txt")))
    required = [m.lower() for m in re.findall(r"^[A-Za-z0-9_-]+", text, re.MULTILINE)]
    assert len(set(required)) == len(required)
    files = [*MODULES.values(), *PROGRAMS, *TESTS]
    used = {module for path in [*files, *NOTEBOOKS] for module in imports(path)}
    used -= {path.stem for path in files} | sys.stdlib_module_names
    assert {INSTALLED_AS.get(name, name) for name in used} <= set(required)


def global_state():
    """What an import could change: random numbers, defaults of PyTorch."""
    return (
        torch.get_rng_state().tolist(),
        str(np.random.get_state()),
        random.getstate(),
        torch.get_default_device(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.mark.parametrize("module", MODULES)
def test_import_has_no_side_effect(module, tmp_path, monkeypatch, capfd):
    """Importing a module prints nothing, writes no file, and changes no global state."""
    monkeypatch.chdir(tmp_path)
    before = global_state()
    runpy.run_path(str(MODULES[module]), run_name=f"imported_{module}")
    assert global_state() == before
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- README and docs

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def test_options_in_the_pages():
    """Every option in the train.py commands of README and docs, and in their prose, exists."""
    pages = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    train_options = {"--" + field.name.replace("_", "-") for field in fields(TrainConfig)}
    commands = re.findall(r"train\.py((?:[^\n`]*\\\n)*[^\n`]*)", pages)
    assert len(commands) > 5
    assert set(re.findall(r"--[a-z][a-z-]+", " ".join(commands))) <= train_options | {"--help"}
    sources = "".join(path.read_text() for path in [*MODULES.values(), *PROGRAMS])
    known = (
        train_options
        | set(re.findall(r'"(--[a-z-]+)"', sources))
        | {"--max-restarts", "--nnodes", "--help", "--python"}
    )
    prose = re.sub(r"```.*?```", "", pages, flags=re.DOTALL)
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", prose)) <= known


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links(path):
    """Every file and every heading that a Markdown file links to exists."""
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}
    links = re.findall(r"\]\((?!https?:)([^)]+)\)|src=\"(?!https?:)([^\"]+)", text)
    links = [link or source for link, source in links]
    assert [x for x in links if x not in anchors and not (path.parent / x).exists()] == []


# ---------------------------------------------------------------------------- notebooks

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_notebook_ran_from_top_to_bottom(notebook):
    """The cells of a notebook were executed once, in order: their counts are 1..N."""
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


@each_notebook
def test_notebook_outputs_are_clean(notebook):
    """No output is an error, a warning or a widget, or contains an absolute path."""
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr"
            data = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
            text = json.dumps([output.get("text", ""), data])
            assert not re.search(r"(?<![\w.:/])/(home|root|tmp|Users|mnt|opt|usr)/", text)
            assert str(ROOT) not in text
            assert "application/vnd.jupyter.widget-view+json" not in data


@each_notebook
def test_figures_are_described(notebook):
    """Every figure of a notebook has an alternative text."""
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            for kind in output.get("data", {}):
                if kind.startswith("image/"):
                    assert output["metadata"][kind]["alt"], cell["source"]
