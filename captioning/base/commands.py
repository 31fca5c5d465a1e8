"""What the commands share: errors as one sentence, and the exit status."""

import os
import sys


def exit_status(command) -> int:
    """Call `command()`; returns its result, or 0 for None, as the exit status of a program.

    An error that the user or the machine has caused is printed as a sentence, without traceback.
    """
    try:
        return command() or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the program that reads the output, such as head, has ended
        # Python flushes standard output at exit, which would print another error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        text = str(error)
        # PyTorch prepends the traceback to an exception that was raised in a worker.
        message = text.splitlines()[-1] if text.startswith("Caught ") else text
        print(f"error: {message}", file=sys.stderr)
        return 1
