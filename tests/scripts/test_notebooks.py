"""The five notebooks, executed on a small synthetic dataset as by `make run`."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image, ImageDraw
from run_notebooks import NOTEBOOKS, compress, execute, main, override, parameter

from captioning.scenes.generation import write_synthetic

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """What a run of all notebooks prints, and the code cells of each."""
    folder = tmp_path_factory.mktemp("notebooks")
    write_synthetic(folder / "data", {"train": 40, "val": 10, "test": 10})
    parameters = {
        "DATA_DIR": str(folder / "data"),
        "RUN_DIR": str(folder / "run"),
        "OPTIONS": {"epochs": 1, "embed_size": 32, "hidden_size": 32},
        "ATTEND": {},  # the image size of the other runs
    }
    command = [sys.executable, "scripts/run_notebooks.py", "--out", folder / "notebooks"]
    for name, value in parameters.items():
        command += ["-p", f"{name}={value!r}"]
    before = {name: (ROOT / f"{name}.ipynb").read_bytes() for name in NOTEBOOKS}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert before == {name: (ROOT / f"{name}.ipynb").read_bytes() for name in NOTEBOOKS}
    notebooks = {n: json.loads((folder / f"notebooks/{n}.ipynb").read_text()) for n in NOTEBOOKS}
    return result.stdout, {
        name: [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        for name, notebook in notebooks.items()
    }


def test_every_cell_ran_without_error_or_warning(executed):
    """All code cells ran once, in order, with nothing on standard error and no time stamps."""
    for name, cells in executed[1].items():
        assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1)), name
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert not [o for o in outputs if o.get("name") == "stderr"], name
        assert not [cell for cell in cells if "execution" in cell["metadata"]]


def test_alternative_text(executed):
    """The "alt" in the metadata of a cell describes its figures."""
    kinds = set()
    for cell in (cell for cells in executed[1].values() for cell in cells):
        for output in cell["outputs"]:
            for kind in output.get("data", {}).keys() & {"image/png", "image/jpeg"}:
                kinds.add(kind)
                assert output["metadata"][kind]["alt"] == cell["metadata"]["alt"] != ""
    assert kinds == {"image/png", "image/jpeg"}


def test_the_report(executed):
    """The run ends with the dataset, scores, files, and five pairs of captions."""
    names = "vocabulary size, validation perplexity, test BLEU-4, test CIDEr-D, best.pt, notebooks"
    for text in ("synthetic", "scenes exactly right", *names.split(", ")):
        assert text in executed[0], text
    assert executed[0].count("\n  actual") == executed[0].count("\n  predicted") == 5


def test_a_failing_cell_is_named():
    """An error ends the run and names the notebook, the cell and the error."""
    cells = [nbformat.v4.new_code_cell(text) for text in ("1", "unknown", "1")]
    message = r"error: in the_name.ipynb, cell 2 of 3:(.|\n)*NameError: name 'unknown'"
    with pytest.raises(SystemExit, match=message):
        execute(nbformat.v4.new_notebook(cells=cells), "the_name")


@pytest.mark.parametrize(
    "text", ["DATASET=coco2017", "DATA_DIR=data/coco", "EPOCHS=1 2", "FIRST", "EPOCHS=1"]
)
def test_a_wrong_parameter_is_explained(text, monkeypatch, capsys):
    """An unknown name is an error, and so is a value without quotes, with an example of them."""
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "-p", text])
    with pytest.raises(SystemExit) as stopped:
        main()
    unknown, unquoted = "no notebook has a parameter EPOCHS", f"{text} .*'DATASET=\"coco2017\"'"
    assert stopped.value.code == 2
    assert re.search(unknown if text == "EPOCHS=1" else unquoted, capsys.readouterr().err)


@pytest.mark.parametrize(
    "text, value", [('A="b=c"', "b=c"), ("A = 1", 1), ("A={'b': 2}", {"b": 2}), ("A=None", None)]
)
def test_parameters_are_python_literals(text, value):
    """Strings, numbers, dictionaries and None, with or without spaces around the `=`."""
    assert parameter(text) == ("A", value)


def test_override_changes_one_parameter():
    """A parameter that a notebook has is overridden; the others, and other cells, stay."""
    source = "A = 1  # one\nB = {\n    2: 3,\n}  # two\nC = 4  # three"
    cells = [nbformat.v4.new_code_cell(text) for text in ("B = 5", source)]
    cells[1].metadata.tags = ["parameters"]
    override(nbformat.v4.new_notebook(cells=cells), {"B": "x", "D": 6})
    names = {}
    exec(cells[1].source, names)
    assert (names["A"], names["B"], names["C"], "D" in names) == (1, "x", 4, False)
    assert cells[0].source == "B = 5"


def test_diagrams_stay_sharp():
    """A diagram remains an exact PNG, which is smaller; a photograph becomes a JPEG."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    diagram = Image.new("RGB", (900, 500), "white")
    ImageDraw.Draw(diagram).line((0, 0, 900, 500), "black", 3)
    for picture, kind in ((Image.fromarray(noise), "image/jpeg"), (diagram, "image/png")):
        picture.save(file := io.BytesIO(), "PNG")
        found, figure = compress(base64.b64encode(file.getvalue()).decode())
        assert found == kind and len(figure) <= len(base64.b64encode(file.getvalue()))
    assert Image.open(io.BytesIO(base64.b64decode(figure))).convert("RGB") == diagram
