"""Two processes, with the environment that torchrun sets, compared with one."""

import contextlib
import json
import multiprocessing
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import command_line, supported, tiny_config

from captioning.base.distributed import interleave
from captioning.learning.checkpoint import load_safely
from train import main

# ---------------------------------------------------------------------------- two processes


def train(config, rank=0):
    """Run the command; rank 0 saves the gradient of the first optimizer step beside `out`."""
    original, file = torch.nn.utils.clip_grad_norm_, Path(f"{config.out}-gradient.pt")

    def clip(parameters, max_norm):
        if rank == 0 and not file.exists():
            torch.save([p.grad for p in parameters], file)
        return original(parameters, max_norm)

    with mock.patch("torch.nn.utils.clip_grad_norm_", clip), mock.patch("features.SHARD_SIZE", 5):
        assert main(command_line(config)) == 0


def train_rank(rank, port, config, patches, threads):
    torch.set_num_threads(threads)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    with contextlib.ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(name, replacement))
        train(config, rank)


def train_in_two_processes(config, patches=None):
    """Run the command in two processes; patches: {name: what replaces it} in both."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Not forked from this process: OpenMP cannot be used in a fork of a process whose OpenMP has
    # started threads. The server, which has imported everything, has none.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    threads = torch.get_num_threads()
    processes = [
        context.Process(target=train_rank, args=(rank, store.port, config, patches or {}, threads))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=100)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]


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
