"""A tiny PV guest made by hand: 256 frames, mapped one to one from VIRT, hand-made machine code, a fake hypervisor."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable

from bus.abi.hypercalls import HYPERCALLS
from bus.abi.xen import VMASST_TYPE_writable_pagetables
from bus.addresses import DomId, Mfn, Port
from domains.pv.domain import DomainConfig, PvDomain
from domains.pv.frames import DomainFrames
from domains.pv.xenmap import XenMap
from domains.vcpu.api import PvTraps
from domains.vcpu.unicorn_vcpu import UnicornVcpu

PAGE = 4096
BASE = 0x1000
FRAMES = 256
HEAP = 8
SHARED = BASE + FRAMES
VIRT = 0x4000_0000
"""Virtual address of frame 0: user half, below 4 GiB, one L1 table."""
CODE = VIRT + 16 * PAGE
HANDLERS = VIRT + 17 * PAGE
USER_CODE = VIRT + 18 * PAGE
DATA = VIRT + 20 * PAGE
KERNEL_STACK = VIRT + 33 * PAGE
"""Top of frame 32."""
USER_STACK = VIRT + 35 * PAGE
UNMAPPED = VIRT + 250 * PAGE
L4, L3, L2, L1, USER_L4 = range(5)
SYSCALL = b"\x0f\x05"
STOP = b"\xb8\x3e\x00\x00\x00" + SYSCALL
"""mov eax, 62; syscall: a hypercall that the rig uses to stop."""
STOP_NUMBER = 62


def mov_rax(value: int) -> bytes:
    return b"\x48\xb8" + struct.pack("<Q", value)


def mov_rdi(value: int) -> bytes:
    return b"\x48\xbf" + struct.pack("<Q", value)


def mov_rsi(value: int) -> bytes:
    return b"\x48\xbe" + struct.pack("<Q", value)


def mov_rdx(value: int) -> bytes:
    return b"\x48\xba" + struct.pack("<Q", value)


def mov_rsp(value: int) -> bytes:
    return b"\x48\xbc" + struct.pack("<Q", value)


def hypercall(number: int, *args: int) -> bytes:
    """Machine code of a hypercall with up to three arguments."""
    code = b"".join(move(value) for move, value in zip((mov_rdi, mov_rsi, mov_rdx), args, strict=False))
    return code + b"\xb8" + struct.pack("<I", number) + SYSCALL


class Recorder:
    """Upstream that answers from a dictionary or a function, and keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, bytes]] = []
        self.sent: list[int] = []
        self.lines: list[str] = []
        self.answer: Callable[[int, int, bytes], tuple[int, bytes]] = lambda nr, cmd, data: (0, data)

    def hypercall(self, vcpu: int, nr: int, cmd: int, data: bytes) -> tuple[int, bytes]:
        self.asked.append((nr, cmd, data))
        return self.answer(nr, cmd, data)

    def send_event(self, port: Port) -> int:
        self.sent.append(port)
        return 0

    def console_line(self, text: str) -> None:
        self.lines.append(text)


class Rig:
    """See the module. `now` is the clock; it does not go on by itself."""

    def __init__(self, vcpus: int = 1) -> None:
        self.now = 1_000_000
        self.wall = 1_700_000_000_000_000_000
        self.memory = mmap.mmap(-1, (FRAMES + HEAP) * PAGE)
        self.frames = DomainFrames(
            memoryview(self.memory), BASE, FRAMES, populated=range(BASE, BASE + FRAMES), shared=[SHARED]
        )
        self.xenmap = XenMap(BASE, FRAMES + HEAP, BASE + FRAMES + HEAP - 1, vcpus)
        self.upstream = Recorder()
        self.domain = PvDomain(
            DomainConfig(DomId(7), Mfn(SHARED), BASE + FRAMES + HEAP - 1, vcpus),
            self.frames,
            self.xenmap,
            self._make_vcpu,
            self.upstream,
            HYPERCALLS,
            wall=lambda: self.wall,
            clock=lambda: self.now,
        )
        self.cpu = self.domain.cpu
        self.stopped = 0
        self.domain.calls.table[STOP_NUMBER] = self._stop
        self._tables()
        rc = self.domain.start_flat(CODE, KERNEL_STACK, 0, Mfn(BASE + L4))
        assert rc == 0, rc
        self.state = self.domain.states[0]
        self.regs = self.cpu.regs
        self.domain.unpause()

    def _make_vcpu(self, traps: PvTraps) -> UnicornVcpu:
        vcpu = UnicornVcpu(traps)
        for base, memory in ((BASE, self.memory), (self.xenmap.private.base, self.xenmap.private.memory)):
            vcpu.map(base << 12, ctypes.addressof(ctypes.c_char.from_buffer(memory)), len(memory))  # type: ignore[arg-type]
        return vcpu

    def _tables(self) -> None:
        words = self.frames.words
        for table, child, slot in (
            (L4, L3, VIRT >> 39),
            (L3, L2, VIRT >> 30 & 511),
            (L2, L1, VIRT >> 21 & 511),
        ):
            words[table * 512 + slot] = BASE + child << 12 | 0x67
        words[USER_L4 * 512 + (VIRT >> 39)] = BASE + L3 << 12 | 0x67
        for frame in range(5, 240):
            words[L1 * 512 + frame] = BASE + frame << 12 | 0x67

    def _stop(self, *args: int) -> int:
        self.stopped += 1
        self.cpu.vcpu.request_stop()
        return 0

    # --- memory

    def put(self, address: int, data: bytes) -> None:
        at = address - VIRT
        self.frames.octets[at : at + len(data)] = data
        self.cpu.drop_code(Mfn(BASE + (at >> 12)))

    def get(self, address: int, length: int) -> bytes:
        at = address - VIRT
        return bytes(self.frames.octets[at : at + length])

    def qwords(self, address: int, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}Q", self.get(address, 8 * count))

    # --- running

    def run(self, code: bytes = b"", at: int = CODE) -> None:
        """Put code (a stop is appended) at `at`, go there, and run until a stop, a block or the end."""
        if code:
            self.put(at, code + STOP)
            self.regs.rip = at
        before = self.stopped
        for _ in range(50):
            step = self.domain.run_slice()
            if self.stopped > before or self.domain.finished or not step.runnable:
                return
        raise AssertionError("the guest neither stopped nor ended")

    def handler(self, vector: int, index: int = 0, *, flags: int = 0) -> int:
        """A handler for a vector that stops at once; returns its address."""
        address = HANDLERS + 64 * index
        self.put(address, STOP)
        self.state.trap_address[vector] = address
        self.state.trap_flags[vector] = flags
        return address

    def enter_user(self, code: bytes, *, at: int = USER_CODE) -> None:
        """Give the vCPU a user root and run `code` in user mode."""
        self.go_user(code, at=at)
        self.run()

    def go_user(self, code: bytes, *, at: int = USER_CODE) -> None:
        """The same, but nothing runs yet."""
        if self.state.user_root is None:
            assert self.domain.mmu.take_root(BASE + USER_L4) == 0
            self.state.user_root = Mfn(BASE + USER_L4)
        self.state.kernel_sp = KERNEL_STACK
        if self.state.kernel_mode:
            self.cpu.toggle_mode()
        self.put(at, code)
        self.regs.rsp = USER_STACK
        self.regs.rip = at

    # --- shared info

    @property
    def pending(self) -> int:
        return self.frames.octets[self.state.info]

    @property
    def mask(self) -> int:
        return self.frames.octets[self.state.info + 1]

    @mask.setter
    def mask(self, value: int) -> None:
        self.frames.octets[self.state.info + 1] = value

    def assist_writable_tables(self) -> None:
        self.cpu.assists |= 1 << VMASST_TYPE_writable_pagetables
        self.domain.mmu.writable_page_tables = True


def call(rig: Rig, number: int, *args: int) -> int:
    """Make the hypercall by machine code; its signed value."""
    rig.run(hypercall(number, *args) + b"\x48\x89\xc3")  # mov rbx, rax
    value = int(rig.regs.rbx)
    return value - (1 << 64) if value >> 63 else value
