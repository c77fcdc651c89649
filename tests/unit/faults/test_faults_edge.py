"""The observer in a process and the controller of its faults: each waits for the answer that is meant, and for no longer than its bound."""

from __future__ import annotations

import os
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulation.live import edge
from simulation.live.edge import Board, Edge
from simulation.live.plan import Fault, What
from toolstack.faults import Faults

PLAN = [
    Fault(what=What.KILL, target="nvme", event="dma"),
    Fault(what=What.KILL, target="nvme", event="grant:map"),
]


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Edge, socket.socket]]:
    """An observer, and the other end of its socket, on which nobody answers but the test."""
    with tempfile.TemporaryDirectory(prefix="df-") as directory:
        Board.create(directory)
        board = Board(directory)
        board.write_plan(PLAN)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(Path(directory) / "control"))
        listener.listen(1)
        monkeypatch.setenv("DOMICILE_FAULTS", directory)
        monkeypatch.setattr(edge, "ANSWER_S", 0.1)
        observer = Edge("hypervisor")
        connection, _ = listener.accept()
        try:
            yield observer, connection
        finally:
            for one in (observer._socket, connection, listener):
                one.close()
            observer.board.close()
            board.close()


def test_a_late_answer_is_not_taken_for_the_next_ones(
    controller: tuple[Edge, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first fault is answered when its process has long gone on: the second waits for its own answer."""
    observer, connection = controller
    assert observer.happen("dma") == []
    assert connection.recv(16) == struct.pack("<II", 0, os.getpid())
    assert observer.board.missed(0)
    connection.send(struct.pack("<I", 0))  # too late
    found: list[list[Fault]] = []
    monkeypatch.setattr(edge, "ANSWER_S", 5.0)
    waiting = threading.Thread(target=lambda: found.append(observer.happen("grant:map")))
    waiting.start()
    assert connection.recv(16) == struct.pack("<II", 1, os.getpid())
    waiting.join(0.2)
    assert waiting.is_alive(), "it went on with the answer to another fault"
    connection.send(struct.pack("<I", 1))
    waiting.join(5.0)
    assert [[fault.event for fault in each] for each in found] == [["grant:map"]]
    assert not observer.board.missed(1)


def test_a_controller_that_is_gone_carries_nothing_out(controller: tuple[Edge, socket.socket]) -> None:
    """The process goes on; the fault is marked, and its caller does not carry it out either."""
    observer, connection = controller
    connection.close()
    assert observer.happen("dma") == []
    assert observer.board.missed(0)
    assert observer.board.counts(0) == (1, False)


def test_what_comes_too_late_is_not_carried_out_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller wakes up after the observer gave up: it strikes nobody, and who waits for the fault is told why."""
    faults = Faults()
    monkeypatch.setenv("DOMICILE_FAULTS", faults.directory)
    observer = Edge("hypervisor")
    try:
        fault = faults.add("freeze", target="domio", event="dma")
        ready = faults.add("freeze", target="domio", event="grant:map")
        faults.board.write_table({"domio:1": ["domio", 0]})  # a process id that no signal may go to
        monkeypatch.setattr(faults, "_signal", lambda pid, number: True)
        observer._refresh()
        observer.board.seen(0, 1)
        observer.board.miss(0)
        observer._socket.send(struct.pack("<II", 0, os.getpid()))
        assert observer._answered(0)
        assert not faults.struck
        with pytest.raises(AssertionError, match="not carried out in time"):
            faults.wait(fault, timeout=5.0)
        assert [each.event for each in observer.happen("grant:map")] == ["grant:map"]
        assert faults.wait(ready).pids == (0,)
    finally:
        observer._socket.close()
        observer.board.close()
        faults.close()
