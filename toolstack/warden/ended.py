"""Waiting for the end of a child process, with a bound."""

from __future__ import annotations

import os
import select
import subprocess


def ended_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for its end, not longer than that; whether it has ended. Returns when it does: `Popen.wait` with a bound sleeps between its
    looks, up to 50 ms."""
    if process.poll() is None:
        pidfd = os.pidfd_open(process.pid)
        try:
            poller = select.poll()
            poller.register(pidfd, select.POLLIN)
            poller.poll(max(0.0, seconds) * 1000)
        finally:
            os.close(pidfd)
    return process.poll() is not None
