"""Thousands of asynchronous stops: no instruction runs twice and none is left out. Counters in memory by three kinds of instructions, the
stack, REP INSB and REP OUTSB, a read-modify-write of a device."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from domains.vcpu.api import StopReason
from domains.vcpu.hvm_testing import MMIO, HvmGuest

pytestmark = pytest.mark.usefixtures("paging")

DATA, BUFFER = 0x50000, 0x51000
IN, OUT = 0x60, 0x61
BLOCK = 64
STOPS_A_SECOND = 3000
SLICE = 1 << 40
LOOP = bytes.fromhex(
    "bb00000500"  # mov ebx, DATA
    "48ff03"  # 1: inc qword [rbx]
    "f048ff4308"  # lock inc qword [rbx+8]
    "488b4310 488d4001 48894310"  # mov rax, [rbx+16]; lea rax, [rax+1]; mov [rbx+16], rax
    "50 59 48894b18"  # push rax; pop rcx; mov [rbx+24], rcx
    "bf00100500 b940000000 ba60000000 f36c"  # mov edi, BUFFER; mov ecx, 64; mov edx, IN; rep insb
    "be00100500 b940000000 ba61000000 f36e"  # mov esi, BUFFER; mov ecx, 64; mov edx, OUT; rep outsb
    "be000000e0 ff06"  # mov esi, MMIO; inc dword [rsi]
    "48837b2000"  # cmp qword [rbx+32], 0
)


@contextmanager
def ringing(bell: int) -> Iterator[None]:
    """A process of its own stores to the bell word, which is in memory shared with it: so no lock of Python's is between."""
    child = os.fork()
    if not child:
        word = ctypes.c_uint32.from_address(bell)
        while os.getppid() != 1:
            word.value = 1
            time.sleep(1 / STOPS_A_SECOND)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def soak(guest: HvmGuest, stops: int) -> int:
    """Stop it so often; AssertionError if something happened twice or not at all. How many rounds the guest made."""
    code = LOOP + b"\x0f\x84" + (5 - len(LOOP) - 6).to_bytes(4, "little", signed=True)  # je 1b
    guest.long_mode((code + bytes.fromhex("e6f4ebfe")).hex())
    taken = sent = device = 0

    def port_in(port: int, size: int) -> int:
        nonlocal taken
        assert (port, size) == (IN, 1)
        taken += 1
        return taken - 1 & 0xFF

    def port_out(port: int, size: int, value: int) -> None:
        nonlocal sent
        if port == 0xF4:
            guest.vcpu.request_stop()
            return
        assert (port, size, value) == (OUT, 1, sent & 0xFF), f"byte {sent}"
        sent += 1

    def mmio_read(address: int, size: int) -> int:
        assert (address, size) == (MMIO, 4)
        return device & 0xFFFFFFFF

    def mmio_write(address: int, size: int, value: int) -> None:
        nonlocal device
        assert (address, size, value) == (MMIO, 4, device + 1 & 0xFFFFFFFF)
        device += 1

    exits = guest.exits
    exits.on_port_in, exits.on_port_out = port_in, port_out
    exits.on_mmio_read, exits.on_mmio_write = mmio_read, mmio_write
    vcpu = guest.vcpu
    with ringing(vcpu.bell_address):
        for _ in range(stops):
            assert vcpu.run(SLICE) is StopReason.BELL
            vcpu.clear_bell()
    vcpu.clear_bell()
    guest.memory[DATA + 32] = 1
    assert vcpu.run(SLICE) is StopReason.REQUESTED
    rounds = guest.qword(DATA)
    assert [guest.qword(DATA + 8 * n) for n in range(4)] == [rounds] * 4
    assert taken == sent == rounds * BLOCK
    assert device == rounds
    return rounds


def test_fifteen_hundred_stops() -> None:
    assert soak(HvmGuest(), 1500) > 30


@pytest.mark.long
@pytest.mark.timeout(900)
def test_three_thousand_stops_a_second_for_minutes() -> None:
    """Half a million."""
    assert soak(HvmGuest(), 500_000) > 10_000
