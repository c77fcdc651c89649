"""Memory that an HVM vCPU is given and loses while its guest runs."""

from __future__ import annotations

import ctypes

import pytest

from bus.addresses import MachineAddr
from domains.vcpu.api import StopReason
from domains.vcpu.hvm_testing import HvmGuest

pytestmark = pytest.mark.usefixtures("paging")


def test_memory_that_comes_and_goes_inside_a_hook_does_not_disturb_the_guest() -> None:
    """The region's address is not mapped in the guest's tables: Unicorn meets a page fault of its own when it forgets translations."""
    guest = HvmGuest()
    where = MachineAddr(0x50000000)
    host = ctypes.addressof(ctypes.c_char.from_buffer(guest.memory))
    guest.vcpu.map(where, host, 0x10000)

    def change() -> None:
        guest.vcpu.unmap(where, 0x10000)
        guest.vcpu.map_mmio(where, 0x10000)
        guest.vcpu.map(where, host, 0x8000)

    guest.exits.on_out_hooks[0x10] = change
    # mov rax, 0x123; mov cr2, rax; out 0x10, al; mov rbx, cr2; hlt
    guest.long_mode("48c7c023010000 0f22d0 e610 0f20d3 f4".replace(" ", ""))
    guest.handler(14, "48c7c1ee000000f4")  # mov rcx, 0xee; hlt
    assert guest.run() is StopReason.HALT
    assert guest.vcpu.regs.rbx == 0x123
    assert guest.vcpu.regs.rcx != 0xEE
