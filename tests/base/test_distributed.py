"""Two processes, with the environment that torchrun sets, compared with one."""

import json
import sys
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import supported, tiny_config
from two_processes import train, train_in_two_processes

from captioning.base.checkpoints import load_safely
from captioning.base.distributed import _fresh_store, interleave


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def runs(shared_dataset, request):
    """(relative precision, folder of a run of one process, folder of the same run of two).

    Without dropout, whose random numbers differ between processes.
    """
    if sys.platform != "linux":
        pytest.skip("the processes are started by a fork server")
    supported(request.param)
    one, two = (
        tiny_config(
            shared_dataset,
            dropout=0.0,
            learning_rate=0.02,
            grad_accum_steps=2,
            precision=request.param,
            out=f"{shared_dataset}/{request.param}-{number}",
            cache_dir=f"{shared_dataset}/cache-{number}",
        )
        for number in (1, 2)
    )
    train(one)
    train_in_two_processes(two)
    return 1e-5 if request.param == "float32" else 2e-2, Path(one.out), Path(two.out)


def test_same_gradient(runs):
    """Two processes that share every batch accumulate the gradient of a single process."""
    tolerance, one, two = runs
    gradients = (load_safely(f"{out}-gradient.pt") for out in (one, two))
    for expected, found in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_same_losses(runs):
    """Two processes reach the losses of a single process, epoch by epoch."""
    tolerance, one, two = runs
    expected, found = (
        [
            [line[f"{split}_loss"] for split in ("train", "val")]
            for line in map(json.loads, (out / "history.jsonl").open())
        ]
        for out in (one, two)
    )
    assert len(expected) == 2
    for epoch in (0, 1):
        assert found[epoch] == pytest.approx(expected[epoch], rel=tolerance)


def test_same_metrics(runs):
    """Two processes that share the captioning get the metrics of a single process.

    In bfloat16 rounding could change a caption: only the perplexity is compared.
    """
    tolerance, one, two = runs
    expected, found = (json.loads((out / "metrics.json").read_text()) for out in (one, two))
    assert found.keys() == expected.keys()
    for name in ["perplexity"] if expected["precision"] == "bfloat16" else expected:
        value = expected[name]
        same = value if isinstance(value, str) else pytest.approx(value, rel=tolerance)
        assert found[name] == same, name


def test_one_process_writes(runs):
    """Two processes leave the files of a single process."""
    _, one, two = runs
    assert sorted(path.name for path in two.iterdir()) == sorted(p.name for p in one.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="the processes are started by a fork server")
def test_same_batch_norm(shared_dataset):
    """Two processes validate one model: with the running statistics that the checkpoint contains.

    The perplexity of the best epoch is the one that the command finds again with best.pt.
    """
    config = tiny_config(
        shared_dataset,
        inject="init",
        image_norm=True,
        learning_rate=0.02,
        precision="float32",
        out=f"{shared_dataset}/norm",
    )
    train_in_two_processes(config)
    history = map(json.loads, (Path(config.out) / "history.jsonl").open())
    metrics = json.loads((Path(config.out) / "metrics.json").read_text())
    best = min(line["val_perplexity"] for line in history)
    assert metrics["perplexity"] == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_interleave(world_size):
    """`interleave` restores the order of a list that was divided between ranks."""
    whole = list(range(7))
    assert interleave([whole[rank::world_size] for rank in range(world_size)]) == whole


def started(store):
    """The stores of two ranks that start together, as threads, on the store of torchrun."""
    found = {}

    def start(rank):
        found[rank] = _fresh_store()[0]

    def rendezvous(*args, **kwargs):
        yield store, int(threading.current_thread().name), 2

    threads = [threading.Thread(target=start, args=(rank,), name=str(rank)) for rank in (0, 1)]
    with mock.patch("torch.distributed.rendezvous", rendezvous):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found[0], found[1]


def test_restart():
    """After each start both ranks have the same keys, and none of an earlier start, also if the
    second rank was killed during that one.
    """
    store = torch.distributed.HashStore()
    store.set("request/1", "of a killed rank")
    for _ in range(3):
        first, second = started(store)
        assert not first.check(["address"]) and not second.check(["address"])
        first.set("address", "1")
        assert second.get("address") == b"1"
