"""The five notebooks, executed on a small drawn sample as `make run` executes them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from run_notebooks import NOTEBOOKS, main, override, parameter
from sample_data import write_sample

ROOT = Path(__file__).resolve().parent.parent


def run(tmp_path, options):
    write_sample(tmp_path / "data", {"train": 60, "val": 20, "test": 20})
    options = {"epochs": 1, "embed_size": 32, "hidden_size": 32} | options
    command = [
        sys.executable, "run_notebooks.py", "--out", tmp_path / "notebooks",
        "-p", f"DATA_DIR={str(tmp_path / 'data')!r}", "-p", f"RUN_DIR={str(tmp_path / 'run')!r}",
        "-p", f"OPTIONS={options!r}",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """What a run of all notebooks printed, and the folder it wrote into."""
    before = {name: (ROOT / f"{name}.ipynb").read_bytes() for name in NOTEBOOKS}
    folder = tmp_path_factory.mktemp("notebooks")
    result = run(folder, {})
    assert result.returncode == 0, result.stderr
    assert before == {name: (ROOT / f"{name}.ipynb").read_bytes() for name in NOTEBOOKS}
    return result.stdout, folder


def test_every_cell_ran_without_error_or_warning(executed):
    """All code cells of all notebooks ran once, in order, with nothing on standard error."""
    for name in NOTEBOOKS:
        notebook = json.loads((executed[1] / "notebooks" / f"{name}.ipynb").read_text())
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1)), name
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert not [o for o in outputs if o.get("name") == "stderr"], name


def test_the_table_at_the_end(executed):
    """The run ends with what came of it: dataset, scores, files, and five pairs of captions."""
    for text in ("drawn sample", "vocabulary size", "validation perplexity", "test BLEU-4",
                 "test CIDEr-D", "scenes exactly right", "best.pt", "notebooks"):  # fmt: skip
        assert text in executed[0], text
    assert executed[0].count("\n  actual") == executed[0].count("\n  predicted") == 5


def test_a_failing_cell_is_named(tmp_path):
    """An error stops the run, and says in which notebook and cell it was."""
    result = run(tmp_path, {"backbone": "resnet51"})
    assert result.returncode == 1
    assert "1_Preliminaries.ipynb, cell" in result.stderr and "'resnet51'" in result.stderr


@pytest.mark.parametrize(
    "text", ["DATASET=coco2017", "DATASET=coco 2017", "DATA_DIR=data/coco", "EPOCHS=1 2", "FIRST"]
)
def test_a_parameter_without_quotes_is_explained(text, monkeypatch, capsys):
    """What is no Python literal ends in one sentence that shows the quotes, not in a traceback."""
    monkeypatch.setattr(sys, "argv", ["run_notebooks.py", "-p", text])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and text in said and "'DATASET=\"coco2017\"'" in said


def test_parameters_are_read_as_python():
    """Text, numbers, dictionaries and None are what they are in Python, with or without spaces."""
    for text, value in [
        ('A="b=c"', "b=c"),
        ("A = 1", 1),
        ("A={'b': 2}", {"b": 2}),
        ("A=None", None),
    ]:
        assert parameter(text) == ("A", value)


def test_parameters_are_replaced_and_comments_of_others_stay():
    """Overriding one parameter leaves the lines of the others as they are."""
    source = "A = 1  # one\nB = {\n    2: 3,\n}  # two\nC = 4  # three"
    assert override(source, {"B": "x"}) == "A = 1  # one\nB = 'x'\nC = 4  # three"
