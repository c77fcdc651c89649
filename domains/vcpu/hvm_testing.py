"""A small HVM guest for tests and benchmarks: 2 MiB of memory, recorded exits, an assembler-free boot to
long mode."""

from __future__ import annotations

import ctypes
import mmap
import struct
from typing import Final

from bus.addresses import MachineAddr
from domains.vcpu.api import StopReason
from domains.vcpu.hvm_vcpu import UnicornHvmVcpu

SIZE: Final = 2 << 20
MMIO: Final = 0xE0000000
MMIO_SIZE: Final = 0x10000
RESET: Final = 0xFFF00000
CODE: Final = 0x8000
STACK: Final = 0x7000
GDT: Final = 0x1000
IDT: Final = 0x2000
TSS: Final = 0x3000
TABLES: Final = 0x10000
HANDLERS: Final = 0x9000
"""64-bit handlers, 64 bytes each, one a vector; they are `HLT` unless written."""
IST1: Final = 0x6000


class HvmRecorder:
    """Exits that are kept in `seen`; values from the dictionaries, else all ones."""

    def __init__(self) -> None:
        self.vcpu: UnicornHvmVcpu | None = None
        self.seen: list[tuple[object, ...]] = []
        self.msrs: dict[int, int] = {}
        self.priority = 0
        self.ports: dict[int, int] = {}
        self.on_out_hooks: dict[int, object] = {}

    def _machine(self) -> UnicornHvmVcpu:
        assert self.vcpu is not None
        return self.vcpu

    def on_port_in(self, port: int, size: int) -> int:
        """Record."""
        self.seen.append(("in", port, size))
        return self.ports.get(port, 0xFFFFFFFF)

    def on_port_out(self, port: int, size: int, value: int) -> None:
        """Record; port 0xF4 stops the guest."""
        self.seen.append(("out", port, size, value))
        if port == 0xF4:
            self._machine().request_stop()
        hook = self.on_out_hooks.get(port)
        if callable(hook):
            hook()

    def on_mmio_read(self, address: int, size: int) -> int:
        """Record."""
        self.seen.append(("read", address, size))
        return 0x1122334455667788 & ((1 << 8 * size) - 1)

    def on_mmio_write(self, address: int, size: int, value: int) -> None:
        """Record."""
        self.seen.append(("write", address, size, value))

    def on_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """The arguments."""
        return leaf, subleaf, 0, 0

    def on_rdmsr(self, index: int) -> int:
        """From `msrs`, else #GP."""
        self.seen.append(("rdmsr", index))
        if index not in self.msrs:
            self._machine().raise_fault(13)
        return self.msrs[index]

    def on_wrmsr(self, index: int, value: int) -> None:
        """To `msrs` if it is there, else #GP."""
        self.seen.append(("wrmsr", index, value))
        if index not in self.msrs:
            self._machine().raise_fault(13)
        self.msrs[index] = value

    def on_hypercall(self) -> None:
        """Record RAX; the result is RAX + 1."""
        regs = self._machine().regs
        self.seen.append(("hypercall", regs.rax, regs.rip))
        regs.rax += 1

    def on_rdtsc(self) -> int:
        """A constant."""
        return 0x1122334455667788

    def on_cr_write(self, register: int, value: int) -> int:
        """Record and allow."""
        self.seen.append(("cr", register, value))
        return value

    def on_cr8_read(self) -> int:
        """The last one written."""
        self.seen.append(("cr8",))
        return self.priority

    def on_cr8_write(self, priority: int) -> None:
        """Record and keep."""
        self.seen.append(("cr8", priority))
        self.priority = priority

    def on_invlpg(self, address: int) -> None:
        """Record."""
        self.seen.append(("invlpg", address))


class HvmGuest:
    """A vCPU with memory at 0, the upper half of it again below 4 GiB (the reset vector), and a device
    region."""

    def __init__(self) -> None:
        self.exits: Final = HvmRecorder()
        self.memory: Final = mmap.mmap(-1, SIZE)
        self.host: Final = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.vcpu: Final = self._machine()
        self.exits.vcpu = self.vcpu

    def _machine(self) -> UnicornHvmVcpu:
        vcpu = UnicornHvmVcpu(self.exits)
        vcpu.map(MachineAddr(0), self.host, SIZE)
        vcpu.map(MachineAddr(RESET), self.host + SIZE // 2, SIZE // 2)
        vcpu.map_mmio(MachineAddr(MMIO), MMIO_SIZE)
        return vcpu

    def drop_code(self, address: int, size: int) -> None:
        """Translations of memory that was written from outside."""
        self.vcpu.drop_code(MachineAddr(address), size)

    def write(self, address: int, data: bytes | str) -> None:
        """Write memory, bytes or hexadecimal digits, and drop translations of it."""
        data = bytes.fromhex(data) if isinstance(data, str) else data
        self.memory[address : address + len(data)] = data
        self.drop_code(address, len(data))

    def real_mode(self, code: str) -> None:
        """Real-mode code at CODE, entered from the reset vector by a far jump."""
        self.write(SIZE - 16, b"\xea" + struct.pack("<HH", CODE, 0))  # jmp 0:CODE
        self.write(CODE, code)
        self.vcpu.regs.rsp = STACK

    def long_mode(self, code: str, *, ring3: bool = False) -> None:
        """GDT, IDT (handlers at HANDLERS), TSS and tables, then through real and protected mode to 64-bit
        code."""
        flat = (
            0x00AF9B000000FFFF,
            0x00CF93000000FFFF,
            0x00CF9B000000FFFF,
            0x00CFF3000000FFFF,
            0x00AFFB000000FFFF,
        )
        tss = 0x0000890000000000 | 0x67 | (TSS & 0xFFFFFF) << 16
        self.write(
            GDT, struct.pack("<8Q", 0, *flat, tss, 0)
        )  # 08 code64 10 data 18 code32 20 data3 28 code3 30 TSS
        for vector in range(256):
            self.gate(vector, HANDLERS + 64 * vector if vector < 64 else HANDLERS)
            if vector < 64:
                self.memory[HANDLERS + 64 * vector] = 0xF4
        self.write(
            TSS, bytes(4) + struct.pack("<Q", STACK) + bytes(24) + struct.pack("<Q", IST1) + bytes(0x67 - 44)
        )
        self.write(TSS + 0x66, struct.pack("<H", 0x68))
        for level in range(2):
            self.write(TABLES + 0x1000 * level, struct.pack("<Q", TABLES + 0x1000 * (level + 1) | 7))
        self.write(TABLES + 0x1018, struct.pack("<Q", 0xC0000000 | 0x87))  # 1 GiB page over the device region
        self.write(TABLES + 0x2000, struct.pack("<Q", TABLES + 0x3000 | 7))
        for page in range(512):
            self.write(TABLES + 0x3000 + 8 * page, struct.pack("<Q", page << 12 | 7))
        self.write(GDT + 0x80, struct.pack("<HI", 63, GDT))
        self.write(GDT + 0x90, struct.pack("<HQ", 4095, IDT))
        # 16 bit: lgdt [0x1080]; mov eax,cr0; or al,1; mov cr0,eax; jmp 0x18:CODE+0x20
        self.real_mode("0f01168010 0f20c0 0c01 0f22c0 66ea" + struct.pack("<IH", CODE + 0x20, 0x18).hex())
        # 32 bit: mov ax,0x10; mov ds,ax; mov ss,ax; mov eax,0x20; mov cr4,eax; mov eax,TABLES; mov cr3,eax;
        # mov ecx,0xc0000080; rdmsr; or eax,0x901; wrmsr; mov eax,0x80010001; mov cr0,eax; jmp 8:CODE+0x80
        self.write(
            CODE + 0x20,
            "66b81000 8ed8 8ed0 b820000000 0f22e0 b8" + TABLES.to_bytes(4, "little").hex() + "0f22d8"
            "b9800000c0 0f32 0d01090000 0f30 b801000180 0f22c0 ea" + struct.pack("<IH", CODE + 0x80, 8).hex(),
        )
        # 64 bit: lidt [0x1090]; mov eax,0x30; ltr ax; mov esp,STACK; then jump to the code
        self.write(
            CODE + 0x80, "0f011c2590100000 b830000000 0f00d8 bc" + STACK.to_bytes(4, "little").hex() + "eb59"
        )
        body = CODE + 0x80 + 8 + 5 + 3 + 5 + 2 + 0x59
        self.write(body, code)
        self.body: int = body

    def gate(self, vector: int, target: int, *, ist: int = 0, dpl: int = 3) -> None:
        """A 64-bit interrupt gate."""
        low = target & 0xFFFF | 8 << 16 | ist << 32 | (0x8E | dpl << 5) << 40 | (target >> 16 & 0xFFFF) << 48
        self.write(IDT + 16 * vector, struct.pack("<QQ", low, target >> 32))

    def handler(self, vector: int, code: str) -> None:
        """Code of at most 64 bytes for a vector below 64."""
        self.write(HANDLERS + 64 * vector, code)

    def run(self, blocks: int = 100_000) -> StopReason:
        """Run."""
        return self.vcpu.run(blocks)

    def qword(self, address: int) -> int:
        """A 64-bit word of memory."""
        value: int = struct.unpack_from("<Q", self.memory, address)[0]
        return value
