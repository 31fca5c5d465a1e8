"""Rates, ratios, shares of the machine's limit, and memory: each function measures one thing.

row = alternate(setting, "encoding", seconds=4)    # row["ours"], row["classic"], row["ratio"]
"""

import contextlib
import multiprocessing
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from statistics import median

import classic
import torch
from stages import STAGES, Work, encoder
from torch.utils.flop_counter import FlopCounterMode

BEGIN = time.perf_counter()
IN_MEMORY = ("encoding", "training step", "beam 3 decoding")  # stages whose memory is measured


def progress(text):
    print(f"[{time.perf_counter() - BEGIN:4.0f} s] {text}", flush=True)


def timed(run, count, device):
    """(items per second, seconds) of `run(count)`."""
    finish(device)
    start = time.perf_counter()
    items = run(count)
    finish(device)
    seconds = time.perf_counter() - start
    return items / seconds, seconds


def finish(device):
    """Wait for a GPU, which has only been told what to do by now."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(setting, stage, seconds, rounds=5, limit=None):
    """A row of the table: the project's side of a stage and the classic one by turns.

    A first round of each warms up, and tells how much work fits into `seconds`. `limit(seconds)`
    takes its turns too, right after the project's side; it returns the rate to compare that with.
    """
    progress(stage)
    make_ours, _, items = STAGES[stage]
    works = [make_ours(setting), classic_work(setting, stage)]
    first, counts, rates, limits = [], [], [], []
    for work in works:
        rate, took = timed(work.run, work.smallest, setting.device)
        first.append(rate)
        fitting = round(work.smallest * seconds / took)
        counts.append(min(max(fitting, work.smallest), work.largest))
    for _ in range(rounds):
        ours = timed(works[0].run, counts[0], setting.device)[0]
        limits.append(limit(seconds) if limit else None)
        rates.append([ours, timed(works[1].run, counts[1], setting.device)[0]])
    ours, other = (median(side) for side in zip(*rates, strict=True))
    return {
        "stage": stage, "unit": f"{items}/s", "ours": ours, "classic": other,
        "ratio": median(mine / others for mine, others in rates), "of_limit": None, "note": "",
        "first_round": first, "units_per_round": counts, "rounds": rates, "limits": limits,
    }  # fmt: skip


def classic_work(setting, stage):
    """The classic side of a stage, whose `run` is done by `classic_process`."""

    def ask(count):
        classic_process().send((setting, stage, count))
        try:
            return classic_process().recv()
        except EOFError:
            raise RuntimeError("the classic loop died; is there too little memory?") from None

    return Work(ask, *ask(None))


@cache
def classic_process():
    """The pipe to a process that the classic loop has to itself, as it would in a repository of
    its own: memory that one side keeps for later must not speed up the other.
    """
    fresh = multiprocessing.get_context("spawn")
    here, there = fresh.Pipe()
    fresh.Process(target=answer_all, args=(there,), daemon=True).start()
    there.close()  # the process has the only other one: when it dies, recv() fails
    return here


def answer_all(pipe):
    """In that process: the sizes of a stage's rounds when asked for None, else a round of it."""
    make = cache(lambda setting, stage: STAGES[stage][1](setting))
    with contextlib.suppress(EOFError):  # until the benchmark ends
        while True:
            setting, stage, count = pipe.recv()
            work = make(setting, stage)
            if count is None:
                pipe.send((work.smallest, work.largest))
                continue
            items = work.run(count)
            finish(setting.device)
            pipe.send(items)


def matmul_peak(device, precision):
    """FLOP/s of the best of several large matrix products: what the machine can do at all."""

    def rate(size, products):
        def run(count):
            for _ in range(count):
                torch.mm(a, a)
            return count * 2 * size**3

        a = torch.rand(size, size, device=device).to(getattr(torch, precision))
        return timed(run, products, device)[0]

    if device.type == "cuda":
        return max(rate(8192, 10) for _ in range(3))
    size = 1024 if rate(1024, 1) < 1e10 else 2048  # some CPUs only emulate bfloat16
    return max(rate(size, 1) for _ in range(3))


def with_share(setting, stage, seconds, precision, flops_per_item):
    """As `alternate`, with the share of the machine's peak that the project's side reaches.

    The peak is the fastest matrix product of all rounds. The note has the kinder share by turns
    too, for a machine that is slow for a while.
    """
    row = alternate(setting, stage, seconds, limit=lambda _: matmul_peak(setting.device, precision))
    per_item, peak = flops_per_item(row["units_per_round"][0]), max(row["limits"])
    flops = per_item * row["ours"]
    row["limits"] = [limit / per_item for limit in row["limits"]]  # in items per second
    row |= {"of_limit": flops / peak, "flops": flops, "peak_flops": peak}
    row["note"] = (
        f"{flops / 1e9:,.0f} of {peak / 1e9:,.0f} GFLOP/s in {precision}; "
        f"by turns {share_of_limit(row):.0%}"
    )
    return row


def share_of_limit(row):
    """The median over the rounds: a machine that is slow for a while is so for both."""
    return median(
        ours / limit for (ours, _), limit in zip(row["rounds"], row["limits"], strict=True)
    )


def forward_flops(setting, _=None):
    """FLOPs of the CNN for one image."""
    cnn = encoder(setting)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        cnn.pool(torch.zeros(1, 3, 224, 224, device=setting.device))
    return counter.get_total_flops()


def training_flops(trainer, batches):
    """FLOPs per caption in the last `batches` of an epoch: forward, and twice that backward.

    The LSTM works on padded positions too, and "pre" reads the image before them; the last layer
    sees real targets only. The image's linear layer needs no gradient of its input.
    """
    lstm, vocab_size = trainer.model.decoder.lstm, len(trainer.vocab)
    shorter = 0 if trainer.options.inject == "pre" else 1  # <end> is never read
    sampler, lengths = trainer.train_loader.batch_sampler, trainer.train_loader.dataset.lengths
    sampler.set_epoch(0, max(len(sampler) - batches, 0))
    captions = positions = targets = 0
    for batch in sampler:
        captions += len(batch)
        positions += len(batch) * (lengths[batch].max() - shorter)
        targets += (lengths[batch] - 1).sum()
    hidden = lstm.hidden_size
    products = 3 * positions * 4 * hidden * (lstm.input_size + hidden)
    products += 3 * targets * hidden * vocab_size
    products += 2 * captions * trainer.model.encoder.linear.weight.numel()
    return 2 * float(products) / captions


def padding_row(trainer, batch_size):
    """The share of padding among the targets of an epoch."""
    lengths, sampler = trainer.train_loader.dataset.lengths, trainer.train_loader.batch_sampler
    sampler.set_epoch(0)
    positions = sum(len(batch) * (lengths[batch].max() - 1) for batch in sampler)
    ours = 100 * (1 - (lengths - 1).sum() / positions)
    other = 100 * classic.padding(lengths, batch_size)
    return {"stage": "padding among targets", "unit": "%", "ours": float(ours),
            "classic": float(other), "ratio": None, "of_limit": None,
            "note": "in the LSTM; our last layer and loss see none"}  # fmt: skip


# ---------------------------------------------------------------------------- memory


def peak_memory():
    """MB that this process has occupied at most."""
    with contextlib.suppress(OSError):
        # Linux: of this program alone, whereas ru_maxrss can include the process it came from.
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    import resource  # not on Windows

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 1024)


def memory_of(setting, stage, side):
    """Run one side of a stage a little, in a process of its own; None: only the imports."""
    torch.set_num_threads(1)  # these processes run beside each other, and are not timed
    if stage:
        work = STAGES[stage][side](setting)
        work.run(work.smallest)
    return {
        "memory_mb": peak_memory(),
        "gpu_mb": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None,
    }


def alone(function, *arguments, minutes=60):
    """The result of `function(*arguments)` from a fresh process, which ends with it.

    Raises RuntimeError if the process dies or takes longer than `minutes`.
    """
    fresh = multiprocessing.get_context("spawn")
    receiver, sender = fresh.Pipe(duplex=False)
    process = fresh.Process(target=answer, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()  # the process has the only other one: when it dies, recv() fails
    try:
        if receiver.poll(60 * minutes):
            return receiver.recv()
        raise RuntimeError(f"{function.__name__} has not ended after {minutes} minutes")
    except EOFError:
        raise RuntimeError(f"{function.__name__} died; is there too little memory?") from None
    finally:
        process.join(5)  # let it end by itself, if it has answered
        process.kill()
        process.join()


def answer(sender, function, arguments):
    sender.send(function(*arguments))


def memory_rows(setting):
    progress("memory")
    jobs = [(None, None), *((stage, side) for stage in IN_MEMORY for side in (0, 1))]
    with ThreadPoolExecutor(3) as pool:
        used = list(pool.map(lambda job: alone(memory_of, setting, *job, minutes=5), jobs))
    imports = used.pop(0)["memory_mb"]
    rows = []
    for stage, ours, other in zip(IN_MEMORY, used[0::2], used[1::2], strict=True):
        kind = "gpu_mb" if ours["gpu_mb"] else "memory_mb"
        rows.append({
            "stage": f"peak memory: {stage}", "unit": "MB", "ours": ours[kind],
            "classic": other[kind], "ratio": None, "of_limit": None,
            "note": f"imports alone: {imports:.0f} MB" if kind == "memory_mb"
            else f"of the GPU; of the process {ours['memory_mb']:.0f} MB",
        })  # fmt: skip
    return rows
