"""A machine in the foreground, for a container: it lives until SIGTERM, and its hypervisor's log goes to standard output.

Its name is that of `domicile`'s verbs (DOMICILE_MACHINE, or `default`), so that `docker compose exec machine domicile list` finds it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from toolstack.errors import MachineError, MachineGone
from toolstack.machine import Machine

POLL_S = 1.0


def main() -> int:
    """Exit status 0 after SIGTERM or SIGINT, 1 if the machine did not start or went down by itself."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    try:
        machine = Machine(os.environ.get("DOMICILE_MACHINE", "default"))
    except MachineError as error:
        print(f"machine: {error}", file=sys.stderr)
        return 1
    with machine:
        print(f"machine {machine.runtime.name}: up", flush=True)
        told = 0
        while not stop.is_set():
            try:
                log = machine.client.request("dmesg")
            except MachineGone:
                print(f"machine: went down: {machine.errors()}", file=sys.stderr)
                return 1
            # The log is a ring: once it has gone round, what is new is not told apart, and all of it is shown again.
            new = log[told:] if len(log) >= told else log
            told = len(log)
            if new:
                print(new.decode("utf-8", "replace"), end="", flush=True)
            stop.wait(POLL_S)
    print("machine: down", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
