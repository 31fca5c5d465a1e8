"""Fault injection: killed processes, on one node or two; full disks; 20 epochs of memory.

    python tests/faults.py                   # all of them, a few minutes; prints a table
    python tests/faults.py kill memory       # some of them
    python tests/faults.py kill --times 3    # a shorter trial

These trials are too slow for `make test`, and some require root on Linux (a small tmpfs, two
network namespaces). Those that this machine does not support are reported as not tried. The exit
status is 1 if a trial failed.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory

# The project's modules are one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("Agg")  # renders to a file, without a display

import numpy as np
import torch
from conftest import command_line, tiny_config, write_dataset
from training_runs import assert_same_result

from captioning.base.checkpoints import load_safely
from captioning.data.splits import prepare_splits
from captioning.figures.plots import curves
from captioning.learning.train_config import config_for
from train import main

ROOT = Path(__file__).resolve().parent.parent
FORK = multiprocessing.get_context("fork")  # a child starts with everything imported


class Unsupported(Exception):
    """This machine does not support the trial."""


# ---------------------------------------------------------------------------- runs in processes


def start(config, log=None):
    """Run the command line of `config` in a new process; its output goes to `log`."""
    process = FORK.Process(target=log_into, args=(config, log or f"{config.out}.log"))
    process.start()
    return process


def log_into(config, log):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.exit(main(command_line(config)))


def finish(config, log=None):
    """Run to the end; (exit status, what it printed, seconds)."""
    log = log or f"{config.out}.log"
    begun, process = time.perf_counter(), start(config, log)
    process.join()
    return process.exitcode, Path(log).read_text(), time.perf_counter() - begun


def check_readable(config):
    """Assert that all files that a run has left are complete; returns their number."""
    out, found = Path(config.out), 0
    for name in ("last.pt", "best.pt"):
        if (out / name).exists():
            load_safely(out / name)
            found += 1
    if (out / "history.jsonl").exists():
        lines = [json.loads(line) for line in (out / "history.jsonl").open()]
        assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
        found += 1
    for file in Path(config.cache_dir).glob("features-*/*.npy"):
        assert np.isfinite(np.load(file)).all()
        found += 1
    return found


# ---------------------------------------------------------------------------- a killed process


def interrupt(folder, moments, stop, **options):
    """Stop a run after each of these parts of its duration, and resume it: it has to end like an
    uninterrupted one. Returns [(exit status, number of its complete files)], seconds of a run.
    """
    data = write_dataset(folder / "data")
    config = tiny_config(data, epochs=6, learning_rate=0.02, batch_size=4, **options)
    status, log, seconds = finish(config)
    assert status == 0, log
    stopped = []
    for number, moment in enumerate(moments):
        out, cache = folder / f"{number}", folder / f"{number}-cache"
        run = replace(config, out=str(out), cache_dir=str(cache), resume=True)
        process = start(run)
        process.join(moment * seconds)
        stop(process)
        process.join()
        stopped.append((process.exitcode, check_readable(run)))
        status, log, _ = finish(run)
        assert status == 0, log
        assert_same_result(run.out, config.out)
    return stopped, seconds


def kill(folder, times=25):
    """SIGKILL at random times."""
    moments = np.random.default_rng(0).uniform(0, 1, times)
    stopped, seconds = interrupt(folder, moments, FORK.Process.kill, save_every=2)
    late = sum(files > 0 for _, files in stopped)
    return (
        f"SIGKILL at a random time in a run of {seconds:.1f} s, then `--resume`",
        times,
        f"all {times} ended bit-identical to the uninterrupted run; all files were complete "
        f"({late} of the kills came after the first file)",
    )


def terminate(folder, times=10):
    """The same with SIGTERM, after which the run saves and exits with status 143."""
    stopped, _ = interrupt(folder, np.linspace(0.2, 0.9, times), FORK.Process.terminate)
    saved = sum(status == 128 + signal.SIGTERM for status, _ in stopped)
    return (
        "SIGTERM at evenly spaced times, then `--resume`",
        times,
        f"all {times} ended bit-identical; {saved} arrived during training, which was saved, "
        "the others before or after it",
    )


# ---------------------------------------------------------------------------- a full disk


@contextlib.contextmanager
def small_disk(folder, kilobytes):
    """A file system of that size, mounted at `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    size = f"size={kilobytes}k"
    if os.geteuid() or subprocess.call(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder]):
        raise Unsupported("mounting a small tmpfs requires root on Linux")
    try:
        yield
    finally:
        subprocess.call(["umount", "--lazy", folder])


def disk(folder):
    """Disks of increasing size until a run fits; on smaller ones it stops and can be resumed."""
    data = write_dataset(folder / "data")
    config = tiny_config(data, epochs=3, learning_rate=0.02)
    assert finish(config)[0] == 0
    size = sum(path.stat().st_size for path in Path(config.out).iterdir()) // 1024
    stopped = fits = 0
    for number, room in enumerate(np.linspace(8, 1.7 * size, 16).astype(int)):
        disk = folder / f"disk-{number}"
        run = replace(config, out=str(disk / "out"), cache_dir=str(disk / "cache"), resume=True)
        with small_disk(disk, room):
            log = folder / f"disk-{number}.txt"
            status, output, _ = finish(run, log)  # the log is not on the full disk
            check_readable(run)
            if status == 0:
                fits += 1
                continue
            errors = re.findall("^error: ", output, re.MULTILINE)
            assert status == 1 and len(errors) == 1 and "Traceback" not in output, output
            assert not list(disk.rglob("*.part"))
            stopped += 1
            subprocess.check_call(["mount", "-o", f"remount,size={8 * size}k", disk])
            status, output, _ = finish(run, log)
            assert status == 0, output
            assert_same_result(run.out, config.out)
    return (
        "disks of 16 sizes, full at features, vocabulary, checkpoints or history",
        stopped + fits,
        f"{stopped} stopped with one sentence, files intact, none partially written; with more "
        f"space, `--resume` ended bit-identical; {fits} were large enough",
    )


# ---------------------------------------------------------------------------- two nodes


NODES = {"captions-a": "10.213.0.1", "captions-b": "10.213.0.2"}


@contextlib.contextmanager
def two_nodes():
    """Two network namespaces with an address each, connected by a virtual Ethernet pair."""
    commands = [f"netns add {node}" for node in NODES]
    commands += ["link add captions-a type veth peer name captions-b"]
    for node, address in NODES.items():
        commands += [f"link set {node} netns {node}", f"-n {node} link set lo up"]
        commands += [f"-n {node} addr add {address}/24 dev {node}", f"-n {node} link set {node} up"]
    remove_nodes()
    try:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        yield list(NODES)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise Unsupported("network namespaces require root and `ip` on Linux") from error
    finally:
        remove_nodes()


def remove_nodes():
    for name in NODES:
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def torchrun(node, config, log, restarts=0):
    """`torchrun ... train.py` on one of the two nodes."""
    # Both nodes have the same host name, so torchrun has to be told which one is the host.
    address, host = NODES[node], int(node == "captions-a")
    words = f"""ip netns exec {node} env OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME={node}
        {sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1
        --max-restarts {restarts} --rdzv-id captions --rdzv-backend c10d
        --rdzv-endpoint 10.213.0.1:29500 --rdzv-conf is_host={host} --local-addr {address}
        train.py"""
    return subprocess.Popen(
        [*words.split(), *command_line(config)],
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def both(nodes, config, folder, restarts=0, meanwhile=None):
    """A job on both nodes (`config` for each of them): (their statuses, their logs)."""
    logs = [folder / f"{node}.log" for node in nodes]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(log, "w")) for log in logs]
        jobs = [torchrun(*job, restarts) for job in zip(nodes, config, files, strict=True)]
        try:
            if meanwhile:
                meanwhile()
            statuses = [job.wait(timeout=300) for job in jobs]
        except subprocess.TimeoutExpired:
            text = "\n".join(log.read_text() for log in logs)
            raise AssertionError(f"the job still runs after 300 s\n{text}") from None
        finally:
            for job in jobs:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.pid, signal.SIGKILL)
    return statuses, [log.read_text() for log in logs]


def workers_on(node):
    """Process ids of train.py on a node, without torchrun's own."""
    found = subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True)
    workers = []
    for pid in found.stdout.split():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "torch.distributed.run" not in words and "train.py" in words:
                workers.append(int(pid))
    return workers


def wait_for_worker(node):
    """The process id of the first train.py on a node, as soon as it has started."""
    while not (workers := workers_on(node)):
        time.sleep(0.01)
    return workers[0]


def network(folder, times=100):
    """Two nodes train; on alternating nodes the worker is killed at a random moment."""
    data = write_dataset(folder / "data")
    options = {"epochs": 10, "patience": 10, "save_every": 4, "resume": True}
    config = tiny_config(data, learning_rate=0.02, batch_size=4, dropout=0.0, **options)
    lifetime, waits, stages = [], [], Counter()
    with two_nodes() as nodes:

        def measure_lifetime():
            process, start = wait_for_worker(nodes[0]), time.perf_counter()
            while process in workers_on(nodes[0]):
                time.sleep(0.01)
            lifetime.append(time.perf_counter() - start)

        statuses, logs = both(nodes, [config, config], folder, 3, measure_lifetime)
        assert statuses == [0, 0], "\n".join(logs)
        for number, moment in enumerate(np.random.default_rng(0).uniform(0, lifetime[0], times)):
            victim = nodes[number % 2]
            run = replace(config, out=str(folder / "run"), cache_dir=str(folder / "run-cache"))
            killed = []

            def kill_worker(run=run, victim=victim, moment=moment, killed=killed):
                process = wait_for_worker(victim)
                time.sleep(moment)
                stages[stage_of(run) if process in workers_on(victim) else "its end"] += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                killed.append(time.perf_counter())

            statuses, logs = both(nodes, [run, run], folder, 3, kill_worker)
            waits.append(time.perf_counter() - killed[0])
            print(f"  {number}: {waits[-1]:.1f} s", file=sys.stderr, flush=True)
            assert statuses == [0, 0] and waits[-1] < 60, f"{waits[-1]:.0f} s\n" + "\n".join(logs)
            assert_same_result(run.out, config.out)
            shutil.rmtree(run.out)
            shutil.rmtree(run.cache_dir)
    moments = ", ".join(f"{count} after {stage}" for stage, count in stages.most_common())
    return (
        "two nodes (network namespaces, `torchrun --nnodes 2 --max-restarts 3`), the worker on "
        "alternating nodes killed at a random moment",
        times,
        f"all {times} jobs ended, the slowest {max(waits):.0f} s after the kill, bit-identical to "
        f"an undisturbed one; kills: {moments}",
    )


def stage_of(run):
    """The last stage that a job has completed, judged by its files."""
    if Path(run.out, "metrics.json").exists():
        return "the report"
    if Path(run.out, "last.pt").exists():
        return "the first checkpoint"
    features = list(Path(run.cache_dir).glob("features-*/*.npy"))
    return "feature extraction" if features else "its start"


def failing_rank(folder):
    """A node without the captions ends the whole job soon, with its error message."""
    data = write_dataset(folder / "data")
    good = tiny_config(data, epochs=2)
    bad = replace(good, train_captions=str(folder / "elsewhere.json"))
    with two_nodes() as nodes:
        begun = time.perf_counter()
        statuses, logs = both(nodes, [good, bad], folder)
        seconds = time.perf_counter() - begun
    assert 0 not in statuses and "elsewhere.json cannot be read" in logs[1], "\n".join(logs)
    return (
        "two nodes, one of them without the captions file",
        1,
        f"both ended after {seconds:.0f} s, the failing one with its message; no hang",
    )


# ---------------------------------------------------------------------------- a killed worker


def worker(folder):
    """A data-loader worker is killed during training."""
    data = write_dataset(folder / "data")
    config = tiny_config(data, epochs=50, patience=50, fine_tune="all", num_workers=2)
    process = start(config)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (Path(config.out) / "last.pt").exists():
        time.sleep(0.05)
    while not children.read_text().split():
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    process.join(120)
    log = Path(f"{config.out}.log").read_text()
    assert process.exitcode == 1 and "--num-workers" in log and "Traceback" not in log, log
    check_readable(config)
    return (
        "a data-loader worker killed during training",
        1,
        "one sentence, status 1, checkpoints intact",
    )


# ---------------------------------------------------------------------------- memory


def memory(folder, epochs=20):
    """Resident memory after each of 20 epochs on the synthetic scenes, and a figure of it."""
    splits = prepare_splits("synthetic", ROOT / "data/synthetic")
    files = {"weights": f"{ROOT}/captioning/scenes/encoder.pt", "cache_dir": f"{folder}/cache"}
    options = {"epochs": epochs, "patience": epochs, **files}
    config = config_for("synthetic", splits, folder / "out", **options)
    process = start(config)
    status, history = Path(f"/proc/{process.pid}/status"), Path(config.out, "history.jsonl")
    used = []
    while process.is_alive() and len(used) < epochs:
        with contextlib.suppress(OSError):
            if len(history.read_text().splitlines()) > len(used):
                used.append(int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) / 1024)
        time.sleep(0.05)
    process.join()
    assert process.exitcode == 0 and len(used) == epochs, used
    ax = curves({"": used}, xlabel="epoch", ylabel="MB")
    ax.set_ylim(0, 1.2 * max(used))
    ax.set_title("Resident memory of a training process", loc="left")
    ax.figure.savefig(ROOT / "docs/memory.png", dpi=120)
    growth = used[-1] - used[4]
    assert growth < 0.03 * used[4], f"memory grows: {used}"
    return (
        f"{epochs} epochs on the synthetic scenes",
        1,
        f"resident memory {used[4]:.0f} MB after epoch 5, {used[-1]:.0f} MB after epoch {epochs}",
    )


# ---------------------------------------------------------------------------- the table

TRIALS = [kill, terminate, disk, network, failing_rank, worker, memory]


def report(names, times=None):
    """Run the trials of these names, or all; times: how often those with a `times`."""
    torch.set_num_threads(1)
    failed = False
    print("| trial | times | result |\n|---|---|---|", flush=True)
    for trial in TRIALS:
        if names and trial.__name__ not in names:
            continue
        repeated = times and "times" in signature(trial).parameters
        with TemporaryDirectory() as folder:
            try:
                row = trial(Path(folder), **{"times": times} if repeated else {})
            except Unsupported as reason:
                row = (trial.__name__, 0, f"not tried: {reason}")
            except AssertionError as error:
                failed = True
                row = (trial.__name__, "", f"**FAILED** {error}")
        print("| {} | {} | {} |".format(*row), flush=True)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fault injection; prints a table.")
    parser.add_argument("names", nargs="*", help=", ".join(trial.__name__ for trial in TRIALS))
    parser.add_argument("--times", type=int, help="repetitions of each trial that has several")
    args = parser.parse_args()
    sys.exit(report(args.names, args.times))
