"""An HVM domain with 4 MiB of memory, hand-made code and a hypervisor that only records."""

from __future__ import annotations

import ctypes
import mmap
import struct
import time
from typing import Any

from bus.abi.hvm import save
from bus.abi.hypercalls import HYPERCALLS
from bus.addresses import DomId, Mfn, Port
from domains.hvm.domain import HvmConfig, HvmDomain
from domains.hvm.physmap import PhysicalMap

BASE, FRAMES, HEAP = 0x800, 1024, 8
CODE, STACK, DATA, TABLES, GDT, IDT, HANDLERS = 0x10000, 0x8000, 0x20000, 0x1000, 0x3000, 0x4000, 0x6000
FLAT = 0xFFFFFFFF
PAGING = "hap"
"""Or "shadow": set by the fixture `paging`."""


def p32(value: int) -> str:
    """Four bytes of machine code."""
    return struct.pack("<I", value & FLAT).hex()


def mov(register: str, value: int) -> str:
    """mov r32, imm32."""
    return {"eax": "b8", "ecx": "b9", "edx": "ba", "ebx": "bb", "esi": "be", "edi": "bf"}[register] + p32(
        value
    )


class FakeUpstream:
    """Answers by `answers[(number, command)]`: (rc, data), or a function of the data; else 0 and the data itself."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, bytes]] = []
        self.answers: dict[tuple[int, int], Any] = {}
        self.lines: list[str] = []
        self.sent: list[int] = []

    def hypercall(self, vcpu: int, nr: int, cmd: int, data: bytes) -> tuple[int, bytes]:
        self.calls.append((nr, cmd, data))
        answer = self.answers.get((nr, cmd), (0, data))
        rc, reply = answer(data) if callable(answer) else answer
        return rc, reply

    def send_event(self, port: Port) -> int:
        self.sent.append(port)
        return 0

    def vcpu_state(self, vcpu: int, running: bool) -> None:
        pass

    def console_line(self, text: str) -> None:
        self.lines.append(text)


class Rig:
    """`bits` is 32 (flat, no paging) or 64 (identity-mapped 4 GiB)."""

    def __init__(
        self, code: str, *, bits: int = 64, cpl: int = 0, vcpus: int = 1, flags: int = 2, board: bool = False
    ) -> None:
        self.bits = bits
        size = FRAMES + HEAP << 12
        self.buffer = mmap.mmap(-1, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        self.physmap = PhysicalMap(Mfn(BASE), FRAMES + HEAP, address)
        self.physmap.changed(0, BASE, FRAMES, 1)
        octets = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
        self.upstream = FakeUpstream()
        self.shared = FRAMES << 12
        self.domain = HvmDomain(
            HvmConfig(
                DomId(7), Mfn(BASE + FRAMES), vcpus, slice_blocks=20_000, board=board, hap=PAGING == "hap"
            ),
            self.physmap,
            octets,
            octets.cast("Q"),
            self.upstream,
            HYPERCALLS,
            wall=time.time_ns,
            monotonic=time.monotonic_ns,
        )
        self.write(CODE, code)
        self._tables()
        self.domain.start(self._context(cpl, flags))
        self.domain.unpause()

    def write(self, address: int, data: bytes | str) -> None:
        data = bytes.fromhex(data) if isinstance(data, str) else data
        self.buffer[address : address + len(data)] = data

    def word(self, address: int) -> int:
        value: int = struct.unpack_from("<I", self.buffer, address)[0]
        return value

    def _tables(self) -> None:
        self.write(TABLES, struct.pack("<Q", TABLES + 0x1000 | 7))
        self.write(TABLES + 0x1000, struct.pack("<4Q", *(n << 30 | 0x87 for n in range(4))))
        flat = (0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CF9B000000FFFF)
        self.write(GDT, struct.pack("<4Q", *flat))
        for vector in range(256):
            self.gate(vector, HANDLERS)
        self.handler(
            13, f"{self.store('eax', DATA + 0xFF0)} {mov('eax', 13)} {self.store('eax', DATA + 0xFF4)} f4"
        )

    def gate(self, vector: int, target: int) -> None:
        selector = 8 if self.bits == 64 else 0x18
        low = target & 0xFFFF | selector << 16 | 0x8E << 40 | (target >> 16 & 0xFFFF) << 48
        if self.bits == 64:
            self.write(IDT + 16 * vector, struct.pack("<QQ", low, 0))
        else:
            self.write(IDT + 8 * vector, struct.pack("<Q", low))

    def handler(self, vector: int, code: str) -> None:
        """Code of an interrupt or exception."""
        at = HANDLERS + 0x40 + 64 * (vector % 100)
        self.write(at, code)
        self.gate(vector, at)

    def store(self, register: str, address: int) -> str:
        """mov [address], r32."""
        modrm = {"eax": 0x04, "ecx": 0x0C, "edx": 0x14, "ebx": 0x1C}[register]
        return f"89{modrm:02x}25{p32(address)}" if self.bits == 64 else f"89{modrm | 1:02x}{p32(address)}"

    def load(self, address: int) -> str:
        """mov eax, [address]."""
        return f"8b0425{p32(address)}" if self.bits == 64 else f"8b05{p32(address)}"

    def _context(self, cpl: int, flags: int) -> bytes:
        long = self.bits == 64
        dpl = cpl << 5
        data = 0xC93 | dpl
        fields: dict[str, Any] = {
            "cr0": 0x80000011 if long else 0x11, "cr3": TABLES, "cr4": 0x620, "msr_efer": 0x500 if long else 0, "rflags": flags,
            "rip": CODE, "rsp": STACK, "gdtr_base": GDT, "gdtr_limit": 31, "idtr_base": IDT, "idtr_limit": 4095, "tr_limit": 0x67, "tr_arbytes": 0x8B,
            "cs_sel": (8 if long else 0x18) | cpl, "ss_sel": 0x10 | cpl, "cs_limit": FLAT,
            "cs_arbytes": (0xA9B if long else 0xC9B) | dpl,
        }  # fmt: skip
        for name in ("ds", "es", "fs", "gs", "ss"):
            fields[f"{name}_limit"], fields[f"{name}_arbytes"] = FLAT, data
        cpu = save.HVM_HW_CPU.zero()._replace(**fields)
        return context(cpu)

    def run(self, slices: int = 50) -> None:
        """Until the domain ends, or all is blocked, or so many slices."""
        for _ in range(slices):
            if not self.domain.run_slice().runnable:
                return

    @property
    def regs(self) -> Any:
        return self.domain.vcpu.regs


def record(kind: str, body: bytes, instance: int = 0) -> bytes:
    """One record of an HVM context."""
    return (
        save.HVM_SAVE_DESCRIPTOR.pack(save.hvm_save_descriptor(save.TYPECODES[kind], instance, len(body)))
        + body
    )


def context(cpu: save.hvm_hw_cpu) -> bytes:
    """An HVM context of one vCPU."""
    header = save.HVM_SAVE_HEADER.pack(
        save.hvm_save_header(save.HVM_FILE_MAGIC, save.HVM_FILE_VERSION, 0, 0, 0)
    )
    return record("HEADER", header) + record("CPU", save.HVM_HW_CPU.pack(cpu)) + record("END", b"")
