"""A timeline written to a file while something else goes on: `domicile run --trace`, `domicile trace --output`."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import IO, Final

from toolstack.client import ControlClient
from toolstack.errors import InputError, MachineError
from toolstack.trace.session import TraceSession
from toolstack.trace.timeline import Timeline

POLL_S: Final = 0.05
STOP_S: Final = 30.0


def open_output(path: str) -> IO[str]:
    """The file for a timeline. InputError if it cannot be written."""
    try:
        return open(path, "w", encoding="ascii")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {os.strerror(error.errno or 0)}") from None


class Recorder:
    """Watches a machine on a thread and a connection of its own, from `start` to `stop`."""

    def __init__(self, path: str) -> None:
        """InputError if the file cannot be written."""
        self.path: Final = path
        self._file = open_output(path)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.events = self.dropped = self.left_out = 0
        self.error = ""

    def start(self, control: Path) -> None:
        """The machine is up, its control socket is there. MachineError."""
        session = TraceSession(ControlClient(control))
        self._thread = threading.Thread(target=self._record, args=(session,), name="trace", daemon=True)
        self._thread.start()

    def _record(self, session: TraceSession) -> None:
        try:
            timeline = Timeline(self._file, session.began, session.names)
            while not self._stop.wait(POLL_S) and not session.gone:
                timeline.feed(session.poll())
            timeline.feed(session.poll(last=True))
            timeline.close()
            self.events, self.left_out = timeline.events, timeline.left_out
            self.dropped = session.dropped
        except (OSError, MachineError) as error:
            self.error = str(error)
        except Exception as error:  # a thread's end is seen by nobody: whoever stops it is told
            self.error = f"{type(error).__name__}: {error}"
        finally:
            session.close()

    def stop(self) -> str:
        """End; what there is to say of it, in one line."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(STOP_S)
        if self._thread is not None and self._thread.is_alive():
            # The file is the thread's still, and numbers that it goes on to count would be wrong.
            return f"{self.path}: the trace is not whole: it was not written out within {STOP_S:g} s"
        try:
            self._file.close()
        except OSError as error:
            self.error = self.error or str(error)
        if self.error:
            return f"{self.path}: the trace is not whole: {self.error}"
        text = f"{self.path}: {self.events} events; open it at ui.perfetto.dev"
        if self.dropped:
            text += f"; {self.dropped} records were written over before they were read"
        if self.left_out:
            text += f"; {self.left_out} more events were left out"
        return text
