"""Measuring programs in turn: each prepares its work in a process of its own, and repeats it.

    serve(STAGES)                                       # in the measured program
    with start("stages.py", "training", data, scratch) as process:
        ask(process, 2)                                 # {"rate": items per second, "memory": MB}

The measured program reads the least duration of a round, in seconds, from a line of standard input,
works for that long, and answers with a line of JSON, until its standard input ends.
"""

import contextlib
import io
import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def serve(stages):
    """Run the stage that the command line names: STAGE DATA SCRATCH.

    stages: {name: generator function of (data, scratch)}. A generator prepares its work, and does a
    unit of it, such as an optimizer step, before it yields the number of items in that unit.
    """
    name, data, scratch = sys.argv[1:]
    if name not in stages:
        sys.exit(f"unknown stage {name!r}; choose from {', '.join(stages)}")
    answers = sys.stdout
    with contextlib.redirect_stdout(io.StringIO()):
        work = stages[name](Path(data), Path(scratch))
        next(work)  # prepares, and warms up
        for line in sys.stdin:
            print(json.dumps(measure(work, float(line))), file=answers, flush=True)


def measure(work, seconds):
    """Work for at least so many seconds."""
    items, start, now = 0, time.perf_counter(), 0.0
    while now - start < seconds:
        items += next(work)
        now = time.perf_counter()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the largest so far
    memory /= 2**20 if sys.platform == "darwin" else 2**10
    return {"rate": items / (now - start), "memory": memory}


def start(script, stage, data, scratch):
    """A stage in a process of its own, which ends with the `with` statement."""
    command = [sys.executable, str(script), stage, str(data), str(scratch)]
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def ask(process, seconds):
    """The answer of a round. Raises RuntimeError if the process has died."""
    with contextlib.suppress(BrokenPipeError):
        print(seconds, file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"this command died, see above: {' '.join(process.args)}")
    return json.loads(answer)
