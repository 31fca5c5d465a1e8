"""Two processes, with the environment that torchrun sets, compared with one."""

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import supported, tiny_config
from training_runs import history_of
from two_processes import train, train_in_two_processes

from captioning.base.checkpoints import load_safely
from captioning.base.distributed import _fresh_store, interleave
from captioning.base.modules import select
from captioning.decoding.beam_search import beam_search
from captioning.learning.train_config import SELF_CRITICAL


def best_captions(decoder, memory, max_len):
    """In place of samples, the five best captions of a beam search, which are not random."""
    images = select(memory, torch.arange(0, len(memory[0]), 5))
    tokens = beam_search(decoder, images, 5, max_len, 0.6, n_best=5).tokens
    return SimpleNamespace(tokens=tokens.flatten(0, 1).unsqueeze(1))


SAMPLE = {"captioning.learning.losses.sample": best_captions}
ATTEND = {"inject": "attend", "num_heads": 2}
NEW_WORDS = ATTEND | {"min_word_freq": 2, "best_by": "cider", "learning_rate": 2e-3}
CRITICAL = SELF_CRITICAL | NEW_WORDS | {"loss": "self-critical", "xe_weight": 0.1}
RUNS = {
    "float32": (1e-5, {}),
    "bfloat16": (2e-2, {"precision": "bfloat16"}),
    "new words": (1e-4, NEW_WORDS),
    "self-critical": (1e-4, CRITICAL),
}


@pytest.fixture(scope="module")
def trained(shared_dataset):
    """best.pt of a run with few words, from which others start."""
    options = {"epochs": 6, "learning_rate": 0.03, "min_word_freq": 3, "dropout": 0.0, **ATTEND}
    config = tiny_config(shared_dataset, out=f"{shared_dataset}/trained", **options)
    train(config)
    return f"{config.out}/best.pt"


@pytest.fixture(scope="module", params=RUNS)
def runs(shared_dataset, trained, request):
    """(relative precision, folder of a run of one process, folder of the same run of two).

    Without dropout, whose random numbers differ between processes.
    """
    if sys.platform != "linux":
        pytest.skip("the processes are started by a fork server")
    tolerance, options = RUNS[request.param]
    supported(options.get("precision", "float32"))
    if "inject" in options:
        options = options | {"init_from": trained}
    one, two = (
        tiny_config(
            shared_dataset,
            out=f"{shared_dataset}/{request.param}-{number}",
            cache_dir=f"{shared_dataset}/cache-{number}",
            **{"dropout": 0.0, "learning_rate": 0.02, "grad_accum_steps": 2, **options},
        )
        for number in (1, 2)
    )
    with mock.patch(*SAMPLE, best_captions):
        train(one)
    train_in_two_processes(two, SAMPLE)
    return tolerance, Path(one.out), Path(two.out)


def test_same_gradient(runs):
    """Two processes that share every batch accumulate the gradient of a single process."""
    tolerance, one, two = runs
    gradients = (load_safely(f"{out}-gradient.pt") for out in (one, two))
    for expected, found in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        assert (found - expected).abs().max() <= tolerance * expected.abs().max() + 1e-7


def test_same_history(runs):
    """Two processes reach the losses and rewards of a single process, epoch by epoch."""
    tolerance, one, two = runs
    for expected, found in zip(history_of(one), history_of(two), strict=True):
        for name in {"train_loss", "train_reward", "val_loss", "val_cider"} & expected.keys():
            assert found[name] == pytest.approx(expected[name], rel=tolerance), name


def test_same_files(runs):
    """Two processes leave the files of a single process, with the same words and metrics.

    In bfloat16 rounding could change a caption: only the perplexity is compared.
    """
    tolerance, one, two = runs
    assert sorted(path.name for path in two.iterdir()) == sorted(p.name for p in one.iterdir())
    words = [load_safely(out / "last.pt")["words"] for out in (one, two)]
    assert words[0] == words[1]
    expected, found = (json.loads((out / "metrics.json").read_text()) for out in (one, two))
    assert found.keys() == expected.keys()
    for name in ["perplexity"] if expected["precision"] == "bfloat16" else expected:
        value = expected[name]
        same = value if isinstance(value, (str, list)) else pytest.approx(value, rel=tolerance)
        assert found[name] == same, name


@pytest.mark.skipif(sys.platform != "linux", reason="the processes are started by a fork server")
def test_same_batch_norm(shared_dataset):
    """Two processes validate with the running statistics that the checkpoint contains: the
    perplexity of the best epoch is found again with best.pt."""
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
    """After each start both ranks have the same keys, and none of a start that was killed."""
    store = torch.distributed.HashStore()
    store.set("request/1", "of a killed rank")
    for _ in range(3):
        first, second = started(store)
        assert not first.check(["address"]) and not second.check(["address"])
        first.set("address", "1")
        assert second.get("address") == b"1"
