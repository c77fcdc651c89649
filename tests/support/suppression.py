"""Races of event suppression: a frontend on a vCPU that orders with MFENCE, and a back end in another process: on a vCPU, too, as
guests/domio (in machine code, so that both are at the decisive instructions within nanoseconds), or this project's native one.

The frontend publishes a request and looks whether it has to notify; the back end asks to be notified and looks whether a request is there
already. Each stores, fences and loads. If neither sees what the other stored, a wake-up is lost: the back end sleeps, and nobody rings. The
frontend says for each request what it decided, so that a lost wake-up is seen at once and not by waiting for it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

from bus.abi.io.ring import full_barrier
from bus.addresses import PAGE_SIZE, MachineAddr
from domains.vcpu.testing import BASE, PRESENT_USER_RW, PvGuest
from domains.vcpu.unicorn_vcpu import UnicornVcpu
from drivers.xenbus.paged_ring import PagedRing

RING: Final = 0x10_0000
"""Behind the guest's own memory."""
RUNG, DECIDED, OVER = 16, 17, 18
"""Words behind the ring's indexes: the last request that was notified; the last for which that is decided; the back end wants no more."""
PATIENCE_S: Final = 30.0
MFENCE: Final = bytes.fromhex("0faef0")
NO_FENCE: Final = bytes.fromhex("0f1f00")
"""A NOP of three bytes."""
SHORT: Final = bytes.fromhex("c1e91c")
LONG: Final = bytes.fromhex("c1e916")
"""A native back end takes microseconds where one on a vCPU takes nanoseconds: the frontend's waits, to meet it, are 64 times as long."""
FRONTEND: Final = (
    bytes.fromhex("69d26d4ec641 81c239300000")  # edx = edx * 1103515245 + 12345
    + bytes.fromhex("89d1 c1e91c ffc1")  # ecx = (edx >> 28) + 1: so many
    + bytes.fromhex("ffc9 75fc")  # ... turns of waiting, so that the two meet at every step
    + bytes.fromhex("ffc3 891f")  # ebx += 1; req_prod = ebx
    + MFENCE
    + bytes.fromhex("8b4704 39d8 7503 895f40")  # if req_event == ebx: RUNG = ebx
    + bytes.fromhex("895f44")  # DECIDED = ebx
    + bytes.fromhex("8b4f08 39d9 75f9")  # until rsp_prod == ebx
    + bytes.fromhex("837f4800 74c8")  # until OVER
    + bytes.fromhex("0f05")  # a system call: the end
)


BACKEND: Final = (
    bytes.fromhex("8b07 39d8 7526")  # if req_prod == ebx:
    + bytes.fromhex("8d4b01 894f04")  # req_event = ecx = ebx + 1
    + MFENCE
    + bytes.fromhex("8b07 39d8 7514")  # if req_prod == ebx still:
    + bytes.fromhex("41ffc2")  # r10d += 1: it sleeps
    + bytes.fromhex("8b4744 39c8 75f9")  # until DECIDED == ecx
    + bytes.fromhex("394f40 7408 41ffc3 eb03")  # if RUNG != ecx: r11d += 1, lost
    + bytes.fromhex("41ffc1")  # else (req_prod has changed): r9d += 1
    + bytes.fromhex("ffc3 438d0411")  # ebx += 1; eax = r9d + r10d
    + bytes.fromhex("39f0 7207 c7474801000000")  # if eax >= esi: OVER = 1
    + bytes.fromhex("895f08 39f0 72bc")  # rsp_prod = ebx; again if eax < esi
    + bytes.fromhex("0f05")
)


class Outcome(NamedTuple):
    """What came of it."""

    requests: int
    found: int
    """Races that the back end's second look decided."""
    slept: int
    """Races after which it waited for the notification."""
    lost: int
    """Notifications that did not come."""


def races(count: int, *, fence: bool = True, native: bool = False) -> Outcome:
    """So many races (and the requests that came before the back end asked). `fence` False: the frontend does not order: to see that a lost
    wake-up is seen. `native`: the back end's end of the ring is `PagedRing`. AssertionError if one side stops."""
    with tempfile.TemporaryFile() as file:
        file.truncate(PAGE_SIZE)
        memory = mmap.mmap(file.fileno(), PAGE_SIZE)
        PagedRing([memoryview(memory)], 112).init()
        # Not a fork: what this process has of the vCPU's library is its own.
        child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.support.suppression",
                str(file.fileno()),
                str(count),
                str(int(native)),
            ],
            cwd=Path(__file__).parent.parent.parent,
            pass_fds=[file.fileno()],
            stdout=subprocess.PIPE,
        )
    with child:
        try:
            code = FRONTEND.replace(SHORT, LONG) if native else FRONTEND
            _run(memory, code if fence else code.replace(MFENCE, NO_FENCE), rbx=0, rdx=1)
            told, _ = child.communicate(timeout=PATIENCE_S)
        finally:
            child.kill()
    assert told, "the back end's process failed"
    return Outcome(*json.loads(told))


def _run(memory: mmap.mmap, code: bytes, **registers: int) -> UnicornVcpu:
    """Run it on a vCPU of its own, with that page at RING, until its system call. The other side may be waiting for this processor: it gets
    it now and then."""
    guest = PvGuest(code)
    guest.vcpu.map(MachineAddr(BASE + RING), ctypes.addressof(ctypes.c_char.from_buffer(memory)), PAGE_SIZE)
    guest.set_entry(RING, BASE + RING | PRESENT_USER_RW)
    for name, value in {"rdi": RING, **registers}.items():
        setattr(guest.vcpu.regs, name, value)
    seen, until = b"", time.monotonic() + PATIENCE_S
    while not guest.traps.seen:
        guest.run(20_000)
        os.sched_yield()
        if memory[:16] != seen:
            seen, until = memory[:16], time.monotonic() + PATIENCE_S
        assert time.monotonic() < until, f"nothing happens any more: {seen.hex(' ', 4)}"
    assert guest.traps.seen[0][0] == "syscall", guest.traps.seen
    return guest.vcpu


def _guest(memory: mmap.mmap, count: int) -> Outcome:
    regs = _run(memory, BACKEND, rbx=0, rsi=count, r9=0, r10=0, r11=0).regs
    return Outcome(regs.rbx, regs.r9, regs.r10, regs.r11)


def _native(page: memoryview, count: int) -> Outcome:
    ring, words = PagedRing([page], 112), page.cast("I")
    cons = found = slept = lost = 0
    while found + slept < count:
        if words[0] == cons:
            if ring.ask_for_requests(cons, full_barrier):
                found += 1
            else:
                slept += 1
                _until(words, DECIDED, cons + 1)
                lost += words[RUNG] != cons + 1
        cons += 1
        assert ring.req_prod == cons, f"{ring.req_prod} requests, and {cons - 1} were answered"
        if found + slept == count:
            words[OVER] = 1
        ring.push_responses(cons, cons - 1)
    return Outcome(cons, found, slept, lost)


def _until(words: memoryview, word: int, value: int) -> None:
    end = time.monotonic() + PATIENCE_S
    while True:
        for _ in range(2000):
            if words[word] == value:
                return
        os.sched_yield()
        if time.monotonic() > end:
            raise AssertionError(f"word {word} is {words[word]}, not {value}")


if __name__ == "__main__":
    shared = mmap.mmap(int(sys.argv[1]), PAGE_SIZE)
    races_to_decide = int(sys.argv[2])
    told_of = (
        _native(memoryview(shared), races_to_decide) if int(sys.argv[3]) else _guest(shared, races_to_decide)
    )
    print(json.dumps(told_of))
