"""The command of the results table, on a small dataset in COCO's format."""

import json
import sys

import pytest
import results_table
from conftest import tiny_config

TINY = " --image-size 64 --embed-size 8 --hidden-size 8 --epochs 1 --min-word-freq 1"
ROWS = {
    "par": ("--inject par" + TINY, None),
    "longer": ("--inject par" + TINY, "par"),
    "ensemble": (None, "longer"),
}
REAL_ROWS = results_table.ROWS


@pytest.fixture
def table(shared_dataset, tmp_path, monkeypatch, capsys):
    """Runs the command with small rows; returns the cells of the table, its output and folder."""
    config = tiny_config(shared_dataset)
    data = {name: getattr(config, name) for name in results_table.SPLITS}
    data["encoders"] = {config.backbone: config.weights}
    (tmp_path / "data.json").write_text(json.dumps(data))
    monkeypatch.setattr(results_table, "ROWS", ROWS)

    def run(rows, *seeds, flags=()):
        command = ["--data", tmp_path / "data.json", "--out", tmp_path / "table"]
        command += ["--cache-dir", tmp_path / "cache", "--rows", *rows.split()]
        command += ["--seeds", *seeds, *flags]
        monkeypatch.setattr(sys, "argv", ["results_table.py", *map(str, command)])
        results_table.main()
        text = capsys.readouterr().out
        lines = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
        return lines[2:], text, tmp_path / "table"

    return run


def runs_in(folder):
    """The rows and seeds that have been trained."""
    return sorted(path.name.removeprefix("mobilenet_v3_small-") for path in folder.iterdir())


def test_rows_and_seeds(table):
    """One run per row and seed is trained, and the table has a line for each row; started again,
    the command trains nothing, and prints the same table."""
    lines, _, folder = table("par longer ensemble", 0, 1)
    assert [line[1:3] for line in lines] == [["par", "2"], ["longer", "2"], ["ensemble", "2"]]
    assert runs_in(folder) == ["longer-0", "longer-1", "par-0", "par-1"]
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.pt")}
    assert table("par longer ensemble", 0, 1)[0] == lines
    assert written == {path: path.stat().st_mtime_ns for path in folder.glob("*/*.pt")}


def test_dry_run(table):
    """A dry run prints a command for each row and seed, and trains nothing."""
    _, text, folder = table("par longer ensemble", 0, 1, flags=["--dry-run"])
    assert text.count("python train.py") == 4 and text.count("par-1/best.pt") == 1
    assert not folder.exists()


def test_mean_and_range():
    """Of several seeds, a cell contains the mean, the lowest and the highest value."""
    results = [{"CIDEr-D": 0.4, "minutes": 2}, {"CIDEr-D": 0.6, "minutes": 4}]
    assert results_table.format_cells(results) == " |  | 0.500 (0.400 to 0.600) |  | 3"


def test_all_rows(table, monkeypatch):
    """Each row of the real table can be trained and evaluated, here with a tiny model."""
    rows = {
        row: (options and f"{options}{TINY} --batch-size 16", base)
        for row, (options, base) in REAL_ROWS.items()
    }
    monkeypatch.setattr(results_table, "ROWS", rows)
    lines, _, _ = table(" ".join(rows), 0)
    assert [line[1] for line in lines] == list(REAL_ROWS)
    assert all(float(line[5]) >= 0 for line in lines)  # CIDEr-D


def test_missing_base(table):
    """A row also trains the row that it starts from, if that is missing."""
    assert runs_in(table("longer", 0)[2]) == ["longer-0", "par-0"]


def test_interrupted_row(table, monkeypatch):
    """A row that was interrupted continues where it was, instead of at the beginning."""
    real = results_table.train.main

    def interrupted(arguments):
        assert real(arguments) == 0
        return 130

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="not complete"):
        patch.setattr(results_table.train, "main", interrupted)
        table("par", 0)
    monkeypatch.setattr(
        "captioning.learning.loop.train_one_epoch", lambda *_: pytest.fail("trained again")
    )
    assert table("par", 0)[0][0][1:3] == ["par", "1"]
