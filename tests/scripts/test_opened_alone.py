"""Notebooks that are opened in an empty folder."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from run_notebooks import NOTEBOOKS, SETUP

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git repository to clone")
def test_opened_alone(tmp_path):
    """In an empty folder, the first cell of a notebook clones the repository, has pip install its
    requirements, and the imports of all notebooks work.
    """
    (tmp_path / "stub").mkdir()  # in place of pip, which may change the packages of the other tests
    (tmp_path / "stub" / "pip.py").write_text("import sys; print(*sys.argv[1:], flush=True)")
    imports = []
    for name in NOTEBOOKS:
        cells = nbformat.read(ROOT / f"{name}.ipynb", 4).cells
        first, *others = [cell.source for cell in cells if cell.cell_type == "code"]
        assert first == SETUP
        imports += [line for source in others for line in import_lines(source)]
    lines = [SETUP, "sys.path.insert(0, '')", *dict.fromkeys(imports), "print(os.getcwd())"]
    script = "\n".join(lines)
    environment = os.environ | {"REPOSITORY": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(tmp_path / "stub")
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    folder = str(tmp_path / "coco-image-caption")
    assert run.stdout.splitlines() == ["install -qr requirements.txt", folder], run.stderr


def import_lines(source):
    """The import statements of a cell, each as one line."""
    nodes = ast.walk(ast.parse(source))
    return [ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
