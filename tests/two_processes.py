"""The training command in one process, and in two with the environment that torchrun sets."""

import contextlib
import multiprocessing
import os
from pathlib import Path
from unittest import mock

import torch
from conftest import command_line

from train import main


def train(config, rank=0):
    """Run the command; rank 0 saves the gradient of the first optimizer step beside `out`."""
    original, file = torch.nn.utils.clip_grad_norm_, Path(f"{config.out}-gradient.pt")

    def clip(parameters, max_norm):
        if rank == 0 and not file.exists():
            torch.save([p.grad for p in parameters], file)
        return original(parameters, max_norm)

    small_files = mock.patch("captioning.data.extraction.SHARD_SIZE", 5)
    with mock.patch("torch.nn.utils.clip_grad_norm_", clip), small_files:
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
