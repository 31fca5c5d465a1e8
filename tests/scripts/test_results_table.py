"""The command of the results table, on a small dataset in COCO's format."""

import json
import sys
from pathlib import Path

import pytest
import results_table
import torch
from conftest import tiny_config

from captioning.learning.checkpoint import load_safely

TINY = [
    "--image-size",
    "64",
    "--embed-size",
    "8",
    "--hidden-size",
    "8",
    "--epochs",
    "1",
    "--min-word-freq",
    "1",
]
ROWS = {
    "par": (["--inject", "par", *TINY], None),
    "longer": (["--inject", "par", *TINY], "par"),
    "ensemble": (None, "longer"),
}


REAL_ROWS = results_table.ROWS


@pytest.fixture
def table(shared_dataset, tmp_path, monkeypatch, capsys):
    """Runs the command with small rows and two seeds; returns its standard output and folder."""
    config = tiny_config(shared_dataset)
    names = ("train_images", "train_captions", "val_images", "val_captions")
    data = {name: getattr(config, name) for name in names}
    data["encoders"] = {config.backbone: config.weights}
    (tmp_path / "data.json").write_text(json.dumps(data))
    monkeypatch.setattr(results_table, "ROWS", ROWS)

    def run(*arguments):
        command = [
            "--data",
            tmp_path / "data.json",
            "--out",
            tmp_path / "table",
            "--cache-dir",
            tmp_path / "cache",
            "--seeds",
            0,
            1,
        ]
        command += ["--rows", *results_table.ROWS]
        monkeypatch.setattr(sys, "argv", ["results_table.py", *map(str, command), *arguments])
        results_table.main()
        return capsys.readouterr().out, tmp_path / "table"

    return run


def test_rows_and_seeds(table):
    """One run per row and seed is trained, and the table has a line for each row."""
    out, folder = table()
    lines = [line for line in out.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[1:3] for line in lines[2:]] == [
        ["par", "2"],
        ["longer", "2"],
        ["ensemble", "2"],
    ]
    assert sorted(path.name for path in folder.iterdir()) == [
        f"mobilenet_v3_small-{row}-{seed}" for row in ("longer", "par") for seed in (0, 1)
    ]


def test_complete_rows_are_kept(table):
    """Started again, the command trains nothing, and prints the same table."""
    first, folder = table()
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.pt")}
    second, _ = table()
    assert written == {path: path.stat().st_mtime_ns for path in folder.glob("*/*.pt")}
    tables = [[x for x in out.splitlines() if x.startswith("|")] for out in (first, second)]
    assert tables[0] == tables[1]


def test_dry_run(table):
    """A dry run prints a command for each row and seed, and trains nothing."""
    out, folder = table("--dry-run")
    assert out.count("python train.py") == 4 and out.count("par-1/best.pt") == 1
    assert not folder.exists()


def test_mean_and_range(monkeypatch):
    """Of several seeds, a cell contains the mean, the lowest and the highest value."""
    results = [{"CIDEr-D": 0.4, "minutes": 2}, {"CIDEr-D": 0.6, "minutes": 4}]
    assert results_table.format_cells(results) == " |  | 0.500 (0.400 to 0.600) |  | 3"


def test_one_row_alone(table):
    """A row that continues another one trains that one first, if it is missing."""
    _, folder = table("--rows", "longer", "--seeds", "0")
    assert sorted(path.name for path in folder.iterdir()) == [
        f"mobilenet_v3_small-{row}-0" for row in ("longer", "par")
    ]


def test_all_rows(table, monkeypatch):
    """Each row of the real table can be trained and evaluated, here with a tiny model."""
    rows = {
        row: (options and [*options, *TINY, "--batch-size", "16"], base)
        for row, (options, base) in REAL_ROWS.items()
    }
    monkeypatch.setattr(results_table, "ROWS", rows)
    out, _ = table("--rows", *rows, "--seeds", "0")
    lines = [line.split(" | ") for line in out.splitlines() if line.startswith("|")][2:]
    assert [line[1] for line in lines] == list(REAL_ROWS)
    assert all(float(line[5]) >= 0 for line in lines)  # CIDEr-D


def trained_weights(folder, row):
    model = load_safely(folder / f"mobilenet_v3_small-{row}-0" / "best.pt")["model"]
    return torch.cat([w.flatten() for name, w in model.items() if name.startswith("decoder.")])


def test_changed_options(table, monkeypatch, tmp_path):
    """If the options of a row change, it and the rows that start from it are trained from anew."""
    _, folder = table("--rows", "longer", "--seeds", "0")
    before = trained_weights(folder, "longer")
    row = (["--inject", "par", *TINY, "--epochs", "2"], None)
    monkeypatch.setitem(results_table.ROWS, "par", row)
    table("--rows", "longer", "--seeds", "0")
    table("--rows", "longer", "--seeds", "0", "--out", str(tmp_path / "fresh"))
    for name in ("par", "longer"):
        expected = trained_weights(tmp_path / "fresh", name)
        assert torch.equal(trained_weights(folder, name), expected)
    assert not torch.equal(before, expected)


def test_other_captions(table, tmp_path):
    """With other training captions, the same folder does not keep the results of the first."""
    out, folder = table("--rows", "par", "--seeds", "0")
    before = trained_weights(folder, "par")
    data = json.loads((tmp_path / "data.json").read_text())
    captions = json.loads(Path(data["train_captions"]).read_text())
    for annotation in captions["annotations"]:
        annotation["caption"] = "no " + annotation["caption"]
    (tmp_path / "other.json").write_text(json.dumps(captions))
    data["train_captions"] = str(tmp_path / "other.json")
    (tmp_path / "data.json").write_text(json.dumps(data))
    table("--rows", "par", "--seeds", "0")
    assert trained_weights(folder, "par").shape != before.shape


def test_interrupted_row(table, monkeypatch):
    """A row that was interrupted continues where it was, instead of at the beginning."""
    real = results_table.train.main

    def interrupted(arguments):
        assert real(arguments) == 0
        return 130

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="not complete"):
        patch.setattr(results_table.train, "main", interrupted)
        table("--rows", "par", "--seeds", "0")
    monkeypatch.setattr("train.train_one_epoch", lambda *_: pytest.fail("trained again"))
    out, _ = table("--rows", "par", "--seeds", "0")
    assert "| par | 1 |" in out
