"""GRUB for Xen, unmodified, to its prompt and off again, in one process with a fake hypervisor."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from harness import Machine

PLACES = (
    os.environ.get("DOMICILE_GRUB", ""),
    "/usr/lib/grub-xen/grub-x86_64-xen.bin",
    "/tmp/grub/usr/lib/grub-xen/grub-x86_64-xen.bin",
)


def test_grub_reaches_its_prompt_answers_and_halts() -> None:
    """Build, pagetables, console both ways, timers (GRUB waits by TSC), SCHEDOP_shutdown; the page types are sound at the end."""
    kernel = next((Path(place) for place in PLACES if place and Path(place).is_file()), None)
    if kernel is None:
        pytest.skip("Debian's grub-xen-host is not here (DOMICILE_GRUB names another place)")
    machine = Machine(64)
    machine.load(kernel.read_bytes())
    assert machine.run(seconds=30, wait=b"grub> ", text=b"ls\rhalt\r") == "finished"
    assert b"(memdisk)" in machine.upstream.console
    assert machine.upstream.shutdown == 0
    assert machine.domain.crash_text is None
    assert machine.domain.mmu.check_invariants() == []
