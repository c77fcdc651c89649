"""The hypervisor's signs of life: who is asked, who is ended, and when nobody is."""

from __future__ import annotations

import os
import signal
import subprocess

from bus.addresses import DomId
from hypervisor.shell.heartbeat import (
    INTERVAL_NS,
    SILENT_BEATS,
    START_BEATS,
    STOPPED_BEATS,
    Heartbeats,
    is_stopped,
)

A, B = DomId(3), DomId(4)


def beats(heartbeats: Heartbeats, count: int) -> list[tuple[list[DomId], list[DomId]]]:
    """So many beats with both watched."""
    return [heartbeats.beat(number * INTERVAL_NS, [A, B]) for number in range(count)]


def test_one_who_answers_is_asked_each_time_and_never_ended() -> None:
    """And one question is under way at a time to one who does not."""
    heartbeats = Heartbeats(lambda peer: False)
    for number in range(20):
        ask, late = heartbeats.beat(number, [A, B])
        assert (A in ask, B in ask, late) == (True, number == 0, [])
        heartbeats.alive(A)


def test_a_stopped_process_is_ended_after_a_second_and_another_later() -> None:
    """Both say nothing; only the stopped one is ended at once, the other after SILENT_BEATS."""
    heartbeats = Heartbeats(lambda peer: peer == A)
    ended = {
        peer: number for number, (_, late) in enumerate(beats(heartbeats, SILENT_BEATS + 1)) for peer in late
    }
    assert ended[B] == SILENT_BEATS
    assert STOPPED_BEATS * INTERVAL_NS == 1_000_000_000
    first = next(n for n, (_, late) in enumerate(beats(Heartbeats(lambda peer: peer == A), 9)) if A in late)
    assert first == STOPPED_BEATS


def test_who_is_not_watched_any_more_is_forgotten() -> None:
    """Misses do not pass to a successor of the same number, and nobody watched means no deadline."""
    heartbeats = Heartbeats(lambda peer: True)
    beats(heartbeats, STOPPED_BEATS)
    heartbeats.beat(0, [])
    assert heartbeats.next_deadline() is None
    assert heartbeats.beat(0, [A]) == ([A], [])
    heartbeats.alive(B)  # not watched: no effect
    assert heartbeats.next_deadline() == INTERVAL_NS


def test_one_that_is_stopped_before_its_hello_is_ended_and_a_slow_one_is_not() -> None:
    """It cannot be asked. A stop of less than a second, twice, is none of a second."""
    stopped: set[DomId] = set()
    heartbeats = Heartbeats(lambda peer: peer in stopped)
    found: list[tuple[DomId, int]] = []
    for number in range(START_BEATS):
        if number in (20, 100):
            stopped.add(A)
        elif number == 20 + STOPPED_BEATS:
            stopped.clear()
        ask, late = heartbeats.beat(number, [], [B] if found else [A, B])
        assert ask == []
        assert heartbeats.next_deadline() is not None
        found += [(peer, number) for peer in late]
    assert found == [(A, 100 + STOPPED_BEATS)]
    assert heartbeats.beat(0, [A], [B]) == ([A], [B]), "a minute is enough for any start"
    heartbeats.beat(0, [], [])
    assert heartbeats.next_deadline() is None


def test_a_start_is_counted_anew_for_each_process() -> None:
    """One that says hello in time, or ends, leaves nothing to its successor."""
    heartbeats = Heartbeats(lambda peer: False)
    for _ in range(5):
        for number in range(START_BEATS - 1):
            assert heartbeats.beat(number, [], [A]) == ([], [])
        assert heartbeats.beat(0, [A], []) == ([A], [])


def test_a_stopped_process_is_seen() -> None:
    """State T of a real process; not of one that runs, or is not there."""
    process = subprocess.Popen(["/bin/sleep", "60"])
    try:
        assert not is_stopped(process.pid)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert is_stopped(process.pid)
    finally:
        process.kill()
        process.wait()
    assert not is_stopped(process.pid)
