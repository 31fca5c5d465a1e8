"""Two processes, with the environment that torchrun gives them, against one alone."""

import json
import multiprocessing
import os
import socket
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from conftest import command_line, tiny_options

from distributed import interleave
from model import load_safely
from train import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the processes are forked")


def one_of_two(rank, port, options):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    sys.exit(main(command_line(options)))


@pytest.fixture(scope="module")
def runs(shared_dataset):
    """The folders of two equal runs: one of a single process, one of two.

    They have no dropout, since each process draws its own, and compute in float32: bfloat16 would
    round half a batch in another way than a whole one.
    """
    with mock.patch("train.fast_precision", lambda device: nullcontext()):
        return run_both(shared_dataset)


def run_both(shared_dataset):
    alone = tiny_options(shared_dataset, dropout=0.0, learning_rate=0.02)
    together = replace(alone, out=f"{alone.out}-2", cache=f"{alone.cache}-2")
    assert main(command_line(alone)) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=one_of_two, args=(rank, port, together)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=100)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return Path(alone.out), Path(together.out)


def test_two_processes_train_as_one(runs):
    """Two processes that share every batch reach the same losses and weights as one alone."""
    alone, together = (
        [json.loads(line) for line in (out / "history.jsonl").open()] for out in runs
    )
    for name in ("train_loss", "val_loss"):
        expected = [line[name] for line in alone]
        assert [line[name] for line in together] == pytest.approx(expected, rel=1e-4)
    alone, together = (load_safely(out / "best.pt")["model"] for out in runs)
    for name, weight in alone.items():
        assert (weight - together[name]).abs().max() < 1e-2, name


def test_two_processes_report_as_one(runs):
    """Two processes that share the captioning report the scores of one alone."""
    alone, together = (json.loads((out / "metrics.json").read_text()) for out in runs)
    for name, value in alone.items():
        same = value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
        assert together[name] == same, name


def test_only_one_process_writes(runs):
    """Two processes leave the same files as one alone."""
    alone, together = (sorted(path.name for path in out.iterdir()) for out in runs)
    assert together == alone


@pytest.mark.parametrize("world", [1, 2, 3])
def test_interleave(world):
    """What was dealt out to processes is put together in its order."""
    whole = list(range(7))
    assert interleave([whole[rank::world] for rank in range(world)]) == whole
