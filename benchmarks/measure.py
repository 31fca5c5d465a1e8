"""Rates, ratios, fractions of the machine's limit, and memory: each function measures one thing.

row = compare(setting, "feature extraction", seconds=4)  # row["ours"], row["classic"], row["ratio"]
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
from setting import Work, encoder
from stages import STAGES
from torch.utils.flop_counter import FlopCounterMode

from captioning.base.distributed import PRECISIONS, resolve_precision

BEGIN = time.perf_counter()
IN_MEMORY = ("feature extraction", "training step", "beam 3 decoding")  # stages in `memory_rows`


def progress(text):
    print(f"[{time.perf_counter() - BEGIN:4.0f} s] {text}", flush=True)


def make_row(stage, unit, ours, classic=None, ratio=None, precision=None, of_limit=None, note=""):
    """A row of the table. precision: of this project's side. of_limit: a fraction."""
    return {
        "stage": stage,
        "precision": precision,
        "unit": unit,
        "ours": ours,
        "classic": classic,
        "ratio": ratio,
        "of_limit": of_limit,
        "note": note,
    }


# ---------------------------------------------------------------------------- rates


def timed(run, count, device):
    """(items per second, seconds) of `run(count)`."""
    synchronize(device)
    start = time.perf_counter()
    items = run(count)
    synchronize(device)
    seconds = time.perf_counter() - start
    return items / seconds, seconds


def synchronize(device):
    """Wait until a GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def precision_of(setting, stage):
    """The precision in which this project computes a stage; None if no network is involved."""
    name = STAGES[stage].precision
    return resolve_precision(setting.device, name) if name in PRECISIONS else name


def compare(setting, stage, seconds, rounds=5, limit=None):
    """A row of the table: this project's side of a stage interleaved with the classic one.

    A first round of each is a warm-up and shows how much work fits into `seconds`. `limit(seconds)`
    runs in each round too, after this project's side; it returns the rate to compare that with.
    """
    progress(stage)
    works = [STAGES[stage].ours(setting), classic_work(setting, stage)]
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
    row = make_row(
        stage,
        f"{STAGES[stage].items}/s",
        ours,
        other,
        median(mine / others for mine, others in rates),
        precision_of(setting, stage),
    )
    return row | {
        "first_round": first,
        "units_per_round": counts,
        "rounds": rates,
        "limits": limits,
    }


def classic_work(setting, stage):
    """The classic side of a stage, whose `run` is executed by `classic_process`."""

    def run(count):
        classic_process().send((setting, stage, count))
        try:
            return classic_process().recv()
        except EOFError:
            raise RuntimeError("the classic loop died; is there too little memory?") from None

    return Work(run, *run(None))


@cache
def classic_process():
    """The pipe to a process of the classic loop alone, as in a repository of its own: memory that
    one side keeps for later must not speed up the other.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    spawn.Process(target=serve_classic, args=(there,), daemon=True).start()
    there.close()  # the process has the only other one: when it dies, recv() fails
    return here


def serve_classic(pipe):
    """In that process: the sizes of a stage's rounds for a count of None, else a round of it."""
    make = cache(lambda setting, stage: STAGES[stage].classic(setting))
    with contextlib.suppress(EOFError):  # until the benchmark ends
        while True:
            setting, stage, count = pipe.recv()
            work = make(setting, stage)
            if count is None:
                pipe.send((work.smallest, work.largest))
                continue
            items = work.run(count)
            synchronize(setting.device)
            pipe.send(items)


# ---------------------------------------------------------------------------- limits


def matmul_peak(device, precision):
    """FLOP/s of the best of several large matrix products: the limit of the machine."""

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


def compare_with_peak(setting, stage, seconds, flops_per_item):
    """As `compare`, with the fraction of the machine's peak that this project's side reaches.

    The peak is the fastest matrix product of all rounds. The note also has the median of the
    fractions within each round, for a machine that is slow for a while.
    """
    precision = precision_of(setting, stage)
    row = compare(setting, stage, seconds, limit=lambda _: matmul_peak(setting.device, precision))
    per_item, peak = flops_per_item(row["units_per_round"][0]), max(row["limits"])
    flops = per_item * row["ours"]
    row["limits"] = [limit / per_item for limit in row["limits"]]  # in items per second
    row |= {"of_limit": flops / peak, "flops": flops, "peak_flops": peak}
    row["note"] = (
        f"{flops / 1e9:,.0f} of {peak / 1e9:,.0f} GFLOP/s; "
        f"median of interleaved rounds {fraction_of_limit(row):.0%}"
    )
    return row


def fraction_of_limit(row):
    """The median over the rounds: a machine that is slow for a while is slow for both."""
    return median(
        ours / limit for (ours, _), limit in zip(row["rounds"], row["limits"], strict=True)
    )


def forward_flops(setting, _=None):
    """FLOPs of the CNN for one image."""
    network = encoder(setting)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.forward_features(torch.zeros(1, 3, 224, 224, device=setting.device))
    return counter.get_total_flops()


def training_flops(run, batches):
    """FLOPs per caption in the last `batches` of an epoch: forward, and twice that backward.

    The LSTM computes padded positions too, and with "pre" one more for the image; the vocabulary
    projection only real targets. The image's linear layer needs no gradient of its input.
    """
    lstm, vocab_size = run.model.decoder.lstm, len(run.model.vocab)
    not_read = 0 if run.config.inject == "pre" else 1  # <end> is never an input
    sampler, lengths = run.train_loader.batch_sampler, run.train_loader.dataset.lengths
    sampler.set_epoch(0, max(len(sampler) - batches, 0))
    captions = positions = targets = 0
    for batch in sampler:
        captions += len(batch)
        positions += len(batch) * (lengths[batch].max() - not_read)
        targets += (lengths[batch] - 1).sum()
    hidden = lstm.hidden_size
    products = 3 * positions * 4 * hidden * (lstm.input_size + hidden)
    products += 3 * targets * hidden * vocab_size
    products += 2 * captions * run.model.encoder.linear.weight.numel()
    return 2 * float(products) / captions


def padding_row(run):
    """The fraction of padding among the targets of an epoch."""
    lengths, sampler = run.train_loader.dataset.lengths, run.train_loader.batch_sampler
    sampler.set_epoch(0)
    positions = sum(len(batch) * (lengths[batch].max() - 1) for batch in sampler)
    return make_row(
        "padding among targets",
        "%",
        float(100 * (1 - (lengths - 1).sum() / positions)),
        float(100 * classic.padding(lengths, run.config.batch_size)),
        note="in the LSTM; the projection and the loss of this project have none",
    )


# ---------------------------------------------------------------------------- memory


def peak_memory():
    """The largest resident size of this process so far, in MB."""
    with contextlib.suppress(OSError):
        # Linux: of this program alone, whereas ru_maxrss can include the parent process.
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    import resource  # not on Windows

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 1024)


def memory_of(setting, stage, side):
    """The memory of the smallest amount of work in a new process; stage None: only the imports."""
    torch.set_num_threads(1)  # these processes run at the same time, and are not timed
    if stage:
        work = getattr(STAGES[stage], side)(setting)
        work.run(work.smallest)
    return {
        "memory_mb": peak_memory(),
        "gpu_mb": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None,
    }


def run_in_new_process(function, *arguments, minutes=60):
    """The result of `function(*arguments)` from a new process, which ends with it.

    Raises RuntimeError if the process dies or takes longer than `minutes`.
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=send_result, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()  # the process has the only other one: when it dies, recv() fails
    try:
        if receiver.poll(60 * minutes):
            return receiver.recv()
        raise RuntimeError(f"{function.__name__} has not ended after {minutes} minutes")
    except EOFError:
        raise RuntimeError(f"{function.__name__} died; is there too little memory?") from None
    finally:
        process.join(5)  # let it end by itself if it has sent its result
        process.kill()
        process.join()


def send_result(sender, function, arguments):
    sender.send(function(*arguments))


def memory_rows(setting):
    progress("memory")
    jobs = [(None, None), *((stage, side) for stage in IN_MEMORY for side in ("ours", "classic"))]
    with ThreadPoolExecutor(3) as pool:
        used = list(pool.map(lambda job: run_in_new_process(memory_of, setting, *job), jobs))
    imports = used.pop(0)["memory_mb"]
    rows = []
    for stage, ours, other in zip(IN_MEMORY, used[0::2], used[1::2], strict=True):
        kind, note = "memory_mb", f"imports alone: {imports:.0f} MB"
        if ours["gpu_mb"]:
            kind, note = "gpu_mb", f"of the GPU; of the process {ours['memory_mb']:.0f} MB"
        precision = precision_of(setting, stage)
        rows.append(
            make_row(
                f"peak memory: {stage}",
                "MB",
                ours[kind],
                other[kind],
                precision=precision,
                note=note,
            )
        )
    return rows
