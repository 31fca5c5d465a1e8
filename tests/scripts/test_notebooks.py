"""The five notebooks, executed on a small synthetic dataset as by `make run`."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nbformat import NotebookNode
from PIL import Image, ImageDraw
from run_notebooks import (
    NOTEBOOKS,
    add_alt_text,
    compress_figure,
    encode,
    main,
    override,
    parameter,
)

from captioning.scenes.dataset import write_synthetic

ROOT = Path(__file__).resolve().parent.parent


def run(tmp_path, options):
    write_synthetic(tmp_path / "data", {"train": 60, "val": 20, "test": 20})
    options = {"epochs": 1, "embed_size": 32, "hidden_size": 32} | options
    command = [
        sys.executable,
        "scripts/run_notebooks.py",
        "--out",
        tmp_path / "notebooks",
        "-p",
        f"DATA_DIR={str(tmp_path / 'data')!r}",
        "-p",
        f"RUN_DIR={str(tmp_path / 'run')!r}",
        "-p",
        f"OPTIONS={options!r}",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The output of a run of all notebooks, and its folder."""
    before = {name: (ROOT / f"{name}.ipynb").read_bytes() for name in NOTEBOOKS}
    folder = tmp_path_factory.mktemp("notebooks")
    result = run(folder, {})
    assert result.returncode == 0, result.stderr
    assert before == {name: (ROOT / f"{name}.ipynb").read_bytes() for name in NOTEBOOKS}
    return result.stdout, folder


def test_every_cell_ran_without_error_or_warning(executed):
    """All code cells ran once, in order, with nothing on standard error."""
    for name in NOTEBOOKS:
        notebook = json.loads((executed[1] / "notebooks" / f"{name}.ipynb").read_text())
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1)), name
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert not [o for o in outputs if o.get("name") == "stderr"], name


def test_the_report(executed):
    """The run ends with the dataset, scores, files, and five pairs of captions."""
    for text in (
        "synthetic",
        "vocabulary size",
        "validation perplexity",
        "test BLEU-4",
        "test CIDEr-D",
        "scenes exactly right",
        "best.pt",
        "notebooks",
    ):
        assert text in executed[0], text
    assert executed[0].count("\n  actual") == executed[0].count("\n  predicted") == 5


def test_a_failing_cell_is_named(tmp_path):
    """An error ends the run and names the notebook and the cell."""
    result = run(tmp_path, {"backbone": "resnet51"})
    assert result.returncode == 1
    assert "1_Preliminaries.ipynb, cell" in result.stderr and "'resnet51'" in result.stderr


@pytest.mark.parametrize(
    "text", ["DATASET=coco2017", "DATASET=coco 2017", "DATA_DIR=data/coco", "EPOCHS=1 2", "FIRST"]
)
def test_a_parameter_without_quotes_is_explained(text, monkeypatch, capsys):
    """A value that is not a Python literal is an error with an example of the quotes."""
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "-p", text])
    with pytest.raises(SystemExit) as stopped:
        main()
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and text in message and "'DATASET=\"coco2017\"'" in message


@pytest.mark.parametrize(
    "text, value", [('A="b=c"', "b=c"), ("A = 1", 1), ("A={'b': 2}", {"b": 2}), ("A=None", None)]
)
def test_parameters_are_python_literals(text, value):
    """Strings, numbers, dictionaries and None, with or without spaces around the `=`."""
    assert parameter(text) == ("A", value)


def test_override_changes_one_parameter():
    """Overriding one parameter does not change the lines of the others."""
    source = "A = 1  # one\nB = {\n    2: 3,\n}  # two\nC = 4  # three"
    assert override(source, {"B": "x"}) == "A = 1  # one\nB = 'x'\nC = 4  # three"


def test_diagrams_stay_sharp():
    """A large diagram remains an exact PNG; a large photograph becomes a JPEG."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    diagram = Image.new("RGB", (900, 500), "white")
    ImageDraw.Draw(diagram).line((0, 0, 900, 500), "black", 3)
    for picture, kind in ((Image.fromarray(noise), "image/jpeg"), (diagram, "image/png")):
        data = {"image/png": encode(picture, "PNG")}
        compress_figure(data, limit=1_000)
        assert list(data) == [kind]
    result = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
    assert result.tobytes() == diagram.tobytes()


def test_alternative_text():
    """The comment `# alt: ..` of a cell, of one or several lines, describes its figure."""
    output = NotebookNode(data={"image/png": ""}, metadata={})
    add_alt_text(output, "# alt: A line\n# chart.\ncurves(x)  # note\n# another comment")
    assert output.metadata == {"image/png": {"alt": "A line chart."}}
    add_alt_text(output := NotebookNode(data={"image/png": ""}, metadata={}), "# A comment\nf()")
    assert output.metadata == {}
