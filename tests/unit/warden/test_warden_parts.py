"""Parts of agents: what shows a process from outside its pid namespace; what is passed on of what it says."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from bus.process_view import ProcessView, is_proc_file, open_files
from toolstack.warden.central import is_pidfd
from toolstack.warden.output import BURST, MAX_LINE, Output, readable

BOUND_S = 10.0


def wait(done: object, what: str) -> None:
    """Until it is true. AssertionError."""
    deadline = time.monotonic() + BOUND_S
    while not done():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        select.select([], [], [], 0.01)


def test_a_view_tells_cpu_time_and_stops_of_all_threads() -> None:
    """By descriptors alone, and nothing any more when the process is gone."""
    program = "import threading\nfor _ in range(2): threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(int, 1)]).start()"
    process = subprocess.Popen([sys.executable, "-c", program])
    view = ProcessView(*open_files(process.pid))
    try:
        wait(lambda: view.cpu_ns() > 200_000_000, "its threads' time is not counted")
        assert not view.stopped()
        process.send_signal(signal.SIGSTOP)
        wait(view.stopped, "it is not seen to be stopped")
        used = view.cpu_ns()
    finally:
        process.kill()
        process.wait()
    assert view.cpu_ns() == used
    assert not view.stopped()
    view.close()


def test_other_descriptors_are_no_view() -> None:
    """A pipe could make the reader wait; a file could say anything. Both are closed."""
    read, write = os.pipe()
    with tempfile.TemporaryFile() as file:
        for fd in (read, file.fileno()):
            assert not is_proc_file(fd)
        with pytest.raises(ValueError, match="proc file system"):
            ProcessView(read, os.dup(file.fileno()))
    os.close(write)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read)


def test_a_pidfd_is_known_from_other_descriptors() -> None:
    """By what the kernel says of it."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        assert is_pidfd(pidfd)
        assert not is_pidfd(0)
        assert not is_pidfd(9999)
    finally:
        os.close(pidfd)


def test_records_of_the_machine_are_told_in_words() -> None:
    """Others' lines stay as they are, whatever they look like."""
    assert readable('{"time": 1, "level": "info", "event": "up", "domain": 3}') == "domain 3: up"
    assert (
        readable('{"time": 1, "level": "warning", "event": "late", "domain": 2147483656}')
        == "warning: device 0x8: late"
    )
    for odd in ("plain", '{"time": 1', '{"time": 1}', '{"time": [], "level": 3, "event": {}, "domain": "x"}'):
        assert readable(odd) == odd


def test_output_is_bounded_in_length_and_rate_and_its_end_is_kept() -> None:
    """A process that says too much costs its container's log little."""
    said: list[str] = []
    read, write = os.pipe()
    os.set_blocking(write, False)
    output = Output(read, said.append)
    os.write(write, b"x" * 5000 + b"\n")
    output.pump()
    assert all(len(line) <= MAX_LINE for line in said)
    for number in range(3 * BURST):
        os.write(write, f"line {number}\n".encode())
        output.pump()
    assert len(said) < 2 * BURST
    os.write(write, b"\x1b[2Jlast words")
    os.close(write)
    output.close()
    assert output.tail().endswith("last words")
    assert not any("\x1b" in line for line in said)
