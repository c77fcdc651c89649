"""The `domicile` command: xl's verbs on a machine of processes. Verbs load what they need when they are called."""

from __future__ import annotations

import gc
import os
import sys


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Every failure is one line on standard error and an exit status; a traceback is a bug."""
    if arguments is None:  # the command itself, not a test of it
        gc.set_threshold(50_000)  # loading code makes many objects, and garbage of few
    from toolstack.cli.app import call
    from toolstack.errors import EXIT_FAILED, EXIT_INTERRUPTED, MachineError

    status = 0
    try:
        status = call(arguments)
        sys.stdout.flush()
    except MachineError as error:
        say_error(str(error))
        status = error.code
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    except TimeoutError as error:  # nobody takes what is on standard output
        say_error(str(error))
        status = EXIT_FAILED
    except BrokenPipeError:  # `domicile list | head -1` is no failure, and no traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 141
    if arguments is None:
        gc.freeze()  # an interpreter that ends looks for garbage once more: 30 ms
    sys.exit(status)


def say_error(text: str) -> None:
    """One line on standard error, in red where that is wanted and possible."""
    line = f"domicile: {' '.join(text.split())}"
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
        line = f"\x1b[31m{line}\x1b[0m"
    print(line, file=sys.stderr, flush=True)
