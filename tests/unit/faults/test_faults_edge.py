"""The observer in a process and the controller of its faults: each waits for the answer that is meant, and for no longer than its bound."""

from __future__ import annotations

import os
import select
import socket
import struct
import tempfile
import threading
import time
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
        assert connection.recv(16) == struct.pack("<II", edge.HELLO, os.getpid())
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


def test_what_time_brings_to_the_hypervisor_is_carried_out_there_and_told(
    controller: tuple[Edge, socket.socket],
) -> None:
    """Also what comes while an answer to another fault is waited for; and the end of the controller is seen once."""
    observer, connection = controller
    late = Fault(what=What.DELAY, target="nvme", at_ms=1.0)
    observer.board.write_plan([*PLAN, late])
    done: list[Fault] = []
    connection.send(struct.pack("<I", 2 | edge.TIMED))
    assert observer.obey(done.extend)
    assert done == [late]
    assert connection.recv(16) == struct.pack("<II", 2 | edge.TIMED, os.getpid())

    connection.send(struct.pack("<I", 2 | edge.TIMED))  # first, and then the answer to the kill
    connection.send(struct.pack("<I", 0))
    assert [fault.event for fault in observer.happen("dma")] == ["dma"]
    assert observer.timed == [2]
    assert observer.obey(done.extend)
    assert done == [late, late]

    connection.close()
    assert not observer.obey(done.extend)
    assert observer.obey(done.extend)
    assert len(done) == 2


def test_a_timed_fault_of_a_link_counts_when_the_hypervisor_has_carried_it_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And not before; without a hypervisor it is missed."""
    faults = Faults()
    try:
        monkeypatch.setenv("DOMICILE_FAULTS", faults.directory)
        nobody = faults.add("silence", target="domio", at_ms=0)
        with pytest.raises(AssertionError, match="not carried out in time"):
            faults.wait(nobody, timeout=10.0)
        observer = Edge("hypervisor")
        table = faults._selector.get_map()
        deadline = time.monotonic() + 5.0
        while faults._hypervisor is None:
            assert time.monotonic() < deadline, len(table)
            select.select([], [], [], 0.01)
        fault = faults.add("bandwidth", target="nvme", at_ms=0, bytes_per_s=1000)
        assert select.select([observer], [], [], 5.0)[0]
        assert not faults.hit(fault)
        done: list[Fault] = []
        assert observer.obey(done.extend)
        assert faults.wait(fault, timeout=10.0).pids == ()
        assert done == [fault]
        observer._socket.close()
        observer.board.close()
    finally:
        faults.close()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"what": "clock-jump", "target": "domu", "at_ms": 1}, "clock-jump needs target = 'hypervisor'"),
        ({"what": "bandwidth", "target": "hypervisor", "at_ms": 1}, "the hypervisor has no link of its own"),
        ({"what": "bandwidth", "target": "nvme", "at_ms": 1, "bytes_per_s": 0}, "bytes_per_s"),
    ],
)
def test_faults_that_make_no_sense_are_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Fault.model_validate(fields)
