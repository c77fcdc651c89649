"""The tables work in a real vCPU: the guest reads the M2P, loads Xen's segments, and can change neither."""

from __future__ import annotations

import ctypes
import struct

from bus.addresses import MachineAddr, VcpuId
from domains.vcpu.api import Trap
from domains.vcpu.testing import Recorder
from domains.vcpu.unicorn_vcpu import UnicornVcpu
from tests.unit.pvmm.pvmm_support import BASE, Guest

CODE, STACK = BASE + 30, BASE + 31
M2P = 0xFFFF_8000_0000_0000


class Machine:
    """A `Guest` with a processor."""

    def __init__(self) -> None:
        self.guest = guest = Guest()
        self.traps = Recorder()
        self.vcpu = UnicornVcpu(self.traps)
        self.traps.vcpu = self.vcpu
        private = guest.xenmap.private
        own = ctypes.addressof(ctypes.c_char.from_buffer(guest.memory))
        xens = ctypes.addressof(ctypes.c_char.from_buffer(private.memory))
        self.vcpu.map(MachineAddr(BASE << 12), own, len(guest.memory))
        self.vcpu.map(MachineAddr(private.base << 12), xens, private.size)
        self.vcpu.regs.gdtr_base = guest.mmu.gdt_base(VcpuId(0))
        self.vcpu.regs.gdtr_limit = 0xEFFF

    def run(self, code: bytes) -> Trap:
        """Run until the trap that ends the code."""
        guest, regs = self.guest, self.vcpu.regs
        guest.frames.octets[CODE - BASE << 12 : (CODE - BASE << 12) + len(code)] = code
        self.vcpu.drop_code(MachineAddr(CODE << 12), 4096)
        regs.cr3 = guest.l4 << 12
        self.vcpu.flush_tlb()
        regs.rip, regs.rsp = guest.va(CODE), guest.va(STACK) + 0x800
        self.traps.seen.clear()
        self.vcpu.run(1000)
        kind, what, _ = self.traps.seen[0]
        assert kind == "trap"
        assert isinstance(what, Trap)
        return what


def test_m2p_shows_own_frames_and_is_read_only() -> None:
    machine = Machine()
    machine.guest.mmu.set_m2p(BASE + 20, [0x1234567])
    code = (
        b"\x48\xbb" + struct.pack("<Q", M2P + 8 * (BASE + 20)) + b"\x48\x8b\x03"
    )  # mov rbx, ..; mov rax, [rbx]
    for other, load in ((BASE - 1, b"\x48\x8b\x0b"), (0, b"\x48\x8b\x13"), (0x3FFFF, b"\x48\x8b\x33")):
        code += b"\x48\xbb" + struct.pack("<Q", M2P + 8 * other) + load  # into rcx, rdx, rsi
    trap = machine.run(code + b"\x48\x89\x03")  # mov [rbx], rax
    regs = machine.vcpu.regs
    assert (trap.vector, trap.error_code) == (14, 7)
    assert regs.cr2 == M2P + 8 * 0x3FFFF
    assert (regs.rax, regs.rcx, regs.rdx, regs.rsi) == (
        0x1234567,
        (1 << 64) - 1,
        (1 << 64) - 1,
        (1 << 64) - 1,
    )
    beyond = machine.run(b"\x48\xbb" + struct.pack("<Q", machine.guest.xenmap.m2p_end) + b"\x48\x8b\x03")
    assert beyond.vector == 14 or machine.vcpu.regs.rax == (1 << 64) - 1


def test_xens_segments_can_be_loaded_but_not_read() -> None:
    machine = Machine()
    code = (
        b"\xba\x2b\xe0\0\0\x8e\xda"  # mov edx, 0xe02b; mov ds, edx
        b"\x68\x33\xe0\0\0\x48\x8d\x05\3\0\0\0\x50\x48\xcb"  # push 0xe033; lea rax, [next]; push rax; retfq
        b"\x48\xbb" + struct.pack("<Q", machine.guest.mmu.gdt_base(VcpuId(0)) + 0xE030) + b"\x48\x8b\x03"
    )
    trap = machine.run(code)
    assert (machine.vcpu.regs.ds, machine.vcpu.regs.cs) == (0xE02B, 0xE033)
    assert (trap.vector, trap.error_code) == (14, 5)


def test_guest_descriptors_and_ldt() -> None:
    """A descriptor of the guest's own GDT and LDT; the LDT page comes by a fault."""
    machine = Machine()
    guest = machine.guest
    table = BASE + 40
    guest.store(table, 2, 0x00CF_9300_0000_FFFF)
    assert guest.read_only(table) == 0
    assert guest.mmu.install_gdt(VcpuId(0), [table], 512) == 0
    assert machine.run(b"\xba\x13\0\0\0\x8e\xda\xcd\x80").is_software
    assert machine.vcpu.regs.ds == 0x13
    assert guest.ext(13, guest.va(table), 512) == 0
    area = guest.mmu.ldt_base(VcpuId(0))
    machine.vcpu.load_segment("ldtr", 0xE050, area, 4095, 0x8200)
    trap = machine.run(b"\xba\x17\0\0\0\x8e\xda\xcd\x80")
    assert trap.vector == 14
    assert machine.vcpu.regs.cr2 == area + 0x10
    assert guest.mmu.ldt_fault(area + 0x10, VcpuId(0)) is True
    assert machine.run(b"\xba\x17\0\0\0\x8e\xda\xcd\x80").is_software
    assert machine.vcpu.regs.ds == 0x17
    guest.clean()


def test_a_store_to_a_table_is_assisted() -> None:
    """The store faults in the vCPU, the assist carries it out, and the guest goes on behind it."""
    machine = Machine()
    guest = machine.guest
    guest.mmu.writable_page_tables = True
    table = BASE + 40
    assert guest.read_only(table) == 0
    assert guest.ext(0, table) == 0
    assisted = []

    def on_trap(trap: Trap) -> None:
        regs = machine.vcpu.regs
        if trap.vector == 14 and guest.mmu.write_fault(regs.cr2, trap.error_code, regs):
            assisted.append(regs.cr2)
        else:
            machine.traps._record("trap", trap)

    machine.traps.trap = on_trap
    entry = BASE + 41 << 12 | 0x25
    code = b"\x48\xbb" + struct.pack("<Q", guest.va(table) + 16) + b"\x48\xb8" + struct.pack("<Q", entry)
    trap = machine.run(code + b"\x48\x87\x03\xcd\x80")  # xchg [rbx], rax; int 0x80
    assert trap.is_software
    assert assisted == [guest.va(table) + 16]
    assert machine.vcpu.regs.rax == 0
    assert guest.load(table, 2) & ~0x100 == entry
    guest.clean()
