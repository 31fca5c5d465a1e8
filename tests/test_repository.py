"""The repository as a whole: imports, requirements, README, notebooks."""

import ast
import importlib
import json
import random
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
TOP_LEVEL = sorted(ROOT.glob("*.py"))
PACKAGE = sorted(ROOT.glob("captioning/**/*.py"))
PROGRAMS = sorted(
    x for name in ("scripts", "benchmarks", "apps") for x in ROOT.glob(f"{name}/**/*.py")
)
TESTS = sorted(ROOT.glob("tests/**/*.py"))
NOTEBOOKS = sorted(ROOT.glob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]

# Where the name to install differs from the name to import.
INSTALLED_AS = {
    "PIL": "pillow",
    "nbformat": "jupyter",
    "nbclient": "jupyter",
    "starlette": "gradio",
}


def name_of(path):
    return str(path.relative_to(ROOT))


def code_cells(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def imports(path):
    """(module, names imported from it) for all imports of a Python file or a notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        lines = "\n".join("".join(cell["source"]) for cell in code_cells(path)).split("\n")
        text = "\n".join(x for x in lines if not x.lstrip().startswith(("%", "!")))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module, [alias.name for alias in node.names]


# ---------------------------------------------------------------------------- imports


def test_import_beside_modules_of_the_same_names(tmp_path, monkeypatch):
    """`import model` works in a folder with modules called as those of this project once were.

    It claims three names of the top level, and loads neither the training code nor the figures.
    """
    for name in ("config", "utils", "run", "metrics", "files", "images", "train"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('this is another project')")
    installed = [path for path in sys.path if "site-packages" in path or "lib/python" in path]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *installed, str(ROOT)])
    kept = {"torch", "torchvision", "numpy", "PIL"} | sys.stdlib_module_names
    with mock.patch.dict(sys.modules):
        before = {name for name in sys.modules if name.split(".")[0] in kept}
        for name in sys.modules.keys() - before:
            del sys.modules[name]
        importlib.import_module("model")
        loaded = sys.modules.keys() - before
    own = {path.stem for path in TOP_LEVEL} | {path.parent.name for path in ROOT.glob("*/*.py")}
    assert loaded & own == {"model", "vocabulary", "captioning"}
    assert not loaded & {"matplotlib", "timm", "captioning.learning", "captioning.figures"}


@pytest.mark.parametrize("path", [*PROGRAMS, *NOTEBOOKS], ids=name_of)
def test_imported_names_exist(path):
    """What a notebook, a script or an app imports from this project exists there."""
    for module, names in imports(path):
        if module.split(".")[0] in {"captioning", *(x.stem for x in TOP_LEVEL)}:
            exec(f"from {module} import {', '.join(names)}" if names else f"import {module}")


def test_requirements():
    """The requirements list every package that the project imports, each once."""
    files = [*ROOT.glob("requirements.txt"), *ROOT.glob("apps/*/requirements.txt")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    required = [name.lower() for name in re.findall(r"^[A-Za-z0-9_-]+", text, re.MULTILINE)]
    assert len(set(required)) == len(required)
    files = [*TOP_LEVEL, *PACKAGE, *PROGRAMS, *TESTS]
    used = {module.split(".")[0] for path in [*files, *NOTEBOOKS] for module, _ in imports(path)}
    own = {"captioning", "apps", *(path.stem for path in files)}
    used -= own | sys.stdlib_module_names
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


@pytest.mark.parametrize("path", [*TOP_LEVEL, *PACKAGE], ids=name_of)
def test_import_has_no_side_effect(path, tmp_path, monkeypatch, capfd):
    """Importing a module prints nothing, writes no file, and changes no global state."""
    monkeypatch.chdir(tmp_path)
    before = global_state()
    runpy.run_path(str(path), run_name=f"imported_{path.stem}")
    assert global_state() == before
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- README and docs


PROGRAM = r"(?:python|torchrun[^\n`]*?) (?:-m (captioning[\w.]+|apps[\w.]+)|([\w/]+\.py))\b"
ARGUMENTS = r"((?:[^\n`|;]*\\\n)*[^\n`|;]*)"
FLAG = r"(?<![\w-])--[a-z][a-z-]*"
FLAGS_OF_TOOLS = {"--max-restarts", "--nnodes", "--python"}  # torchrun, uv


def flags_of(program, capsys) -> set:
    """The flags in the help text of a command of the top level, or in the source of a program."""
    module = importlib.import_module(program.stem) if program in TOP_LEVEL else None
    if not hasattr(module, "parse_args"):
        return set(re.findall(r'"(--[a-z][a-z-]*)"', program.read_text(encoding="utf-8")))
    with pytest.raises(SystemExit):
        module.parse_args(["--help"])
    return set(re.findall(FLAG, capsys.readouterr().out))


def test_commands_in_the_pages(capsys):
    """The programs that README and docs call exist, with the flags that they are given.

    The flags that the text mentions are those of some program.
    """
    pages = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    programs = [*TOP_LEVEL, *PACKAGE, *PROGRAMS, *TESTS]
    flags = {name_of(path): {"--help"} | flags_of(path, capsys) for path in programs}
    given = {}
    for module, file, arguments in re.findall(PROGRAM + ARGUMENTS, pages):
        name = file or module.replace(".", "/") + ".py"
        given.setdefault(name, set()).update(re.findall(FLAG, arguments))
    assert len(given) > 5 and given.keys() - flags.keys() == set()
    assert {name: found - flags[name] for name, found in given.items() if found - flags[name]} == {}
    text = re.sub(r"```.*?```", "", pages, flags=re.DOTALL)
    assert set(re.findall(FLAG, text)) - FLAGS_OF_TOOLS - set().union(*flags.values()) == set()


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links(path):
    """Every file and every heading that a Markdown file links to exists."""
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    anchors = {"#" + re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}
    links = re.findall(r"\]\((?!https?:)([^)]+)\)|src=\"(?!https?:)([^\"]+)", text)
    links = [link or source for link, source in links]
    assert [x for x in links if x not in anchors and not (path.parent / x).exists()] == []


# ---------------------------------------------------------------------------- notebooks

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)


@each_notebook
def test_notebook_ran_from_top_to_bottom(notebook):
    """The cells of a notebook were executed once, in order: their counts are 1..N."""
    counts = [cell["execution_count"] for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


@each_notebook
def test_notebook_outputs_are_clean(notebook):
    """No output is an error, a warning or a widget, or contains an absolute path.

    Every figure has an alternative text.
    """
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr"
            data = output.get("data", {})
            assert "application/vnd.jupyter.widget-view+json" not in data
            images = {kind for kind in data if kind.startswith("image/")}
            text = json.dumps([output.get("text"), *(data[kind] for kind in data.keys() - images)])
            assert not re.search(r"(?<![\w.:/])/(home|root|tmp|Users|mnt|opt|usr)/", text)
            assert str(ROOT) not in text
            assert all(output["metadata"][kind]["alt"] for kind in images), cell["source"]
