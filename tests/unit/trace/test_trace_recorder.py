"""A timeline written beside something else: what goes wrong on its thread is told by whoever stops it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from toolstack.errors import MachineError
from toolstack.trace import recorder as module
from toolstack.trace.recorder import Recorder


class Session:
    """In place of a TraceSession: its `poll` does what the test says."""

    began, gone, dropped = 0, False, 0

    def __init__(self, poll: Any) -> None:
        self.names: dict[int, str] = {}
        self.closed = False
        self._poll = poll

    def poll(self, *, last: bool = False) -> list[Any]:
        self._poll()
        return []

    def close(self) -> None:
        self.closed = True


@contextmanager
def recording(path: Path, monkeypatch: pytest.MonkeyPatch, poll: Any) -> Iterator[tuple[Recorder, Session]]:
    session = Session(poll)
    monkeypatch.setattr(module, "ControlClient", lambda path: None)
    monkeypatch.setattr(module, "TraceSession", lambda client: session)
    recorder = Recorder(str(path))
    recorder.start(path)
    yield recorder, session
    thread = cast(threading.Thread, recorder._thread)
    thread.join(10.0)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("pages"), "the trace is not whole: KeyError: 'pages'"),
        (MachineError("it is gone"), "the trace is not whole: it is gone"),
    ],
)
def test_an_error_of_the_thread_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    """Of any kind: "0 events" would look as if all were well."""

    def fail() -> None:
        raise error

    with recording(tmp_path / "t.json", monkeypatch, fail) as (recorder, session):
        assert recorder.stop() == f"{tmp_path}/t.json: {told}"
        assert session.closed


def test_a_thread_that_does_not_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is not closed under it, and nobody is told that it is whole."""
    monkeypatch.setattr(module, "STOP_S", 0.05)
    go_on = threading.Event()
    try:
        with recording(tmp_path / "t.json", monkeypatch, lambda: go_on.wait(10.0)) as (recorder, session):
            assert recorder.stop() == (
                f"{tmp_path}/t.json: the trace is not whole: it was not written out within 0.05 s"
            )
            assert not recorder._file.closed
            go_on.set()
        assert session.closed
        assert recorder.error == ""
    finally:
        go_on.set()
