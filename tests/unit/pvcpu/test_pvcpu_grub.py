"""GRUB for Xen, unmodified, to its prompt and off again, in one process with a fake hypervisor."""

from __future__ import annotations

import pytest

from tests.unit.pvcpu.harness import Machine
from toolstack.guestfetch import FetchError, fetch


def test_grub_reaches_its_prompt_answers_and_halts() -> None:
    """Build, pagetables, console both ways, timers (GRUB waits by TSC), SCHEDOP_shutdown; the page types are sound at the end."""
    try:
        kernel = fetch("grub").kernel
    except FetchError as error:
        pytest.skip(f"GRUB cannot be had here: {error}")
    machine = Machine(64)
    machine.load(kernel.read_bytes())
    assert machine.run(seconds=30, wait=b"grub> ", text=b"ls\rhalt\r") == "finished"
    assert b"(memdisk)" in machine.upstream.console
    assert machine.upstream.shutdown == 0
    assert machine.domain.crash_text is None
    assert machine.domain.mmu.check_invariants() == []
