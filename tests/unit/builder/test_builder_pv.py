"""The PV builder: what it builds is the start-of-day layout of xen.h, proved by walking the tables from
CR3."""

from __future__ import annotations

import random
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bus.abi.arch_x86 import VCPU_GUEST_CONTEXT
from bus.addresses import Mfn, Port
from domains.dom0.builder import BuildError, PvBuildRequest, PvBuilt, build_pv, guest_context, load_kernel
from tests.unit.builder.elf_maker import Memory, Seg, elf32, elf64, notes
from tests.unit.builder.pv_checker import check

ENTRY, HYPERCALL, BASE, PADDR_OFFSET, P2M, MOD_PFN = 1, 2, 3, 4, 15, 16
FEATURES, HV_START_LOW, XEN_VERSION, LOADER, PHYS32 = 10, 12, 5, 8, 18
LINUX = 0xFFFFFFFF80000000


def request_for(kernel: bytes, p2m: range | list[int], **more: object) -> PvBuildRequest:
    values: dict[str, object] = {"shared_info": Mfn(999), "xenstore_port": Port(1), "console_port": Port(2)}
    values.update(more)
    return PvBuildRequest(kernel=load_kernel(kernel), p2m=p2m, **values)  # type: ignore[arg-type]  # by name


def build(request: PvBuildRequest) -> tuple[PvBuilt, Memory]:
    memory = Memory(len(request.p2m))
    built = build_pv(request, memory)
    check(request, memory, built)
    return built, memory


def kernel_at(base: int, numbers: dict[int, int] | None = None, size: int = 0x3000, **more: bytes) -> bytes:
    values = {BASE: base, ENTRY: base + 0x10, PADDR_OFFSET: 0}
    values.update(numbers or {})
    content = bytes(range(256)) * (size // 256)
    return elf64([Seg(0, content, size + 0x2345)], notes(values, {5: b"xen-3.0", 8: b"generic"}))


@settings(max_examples=40, deadline=None)
@given(
    base=st.sampled_from([0, 0x400000, LINUX, 0xFFFFFFFF80200000, 0xFFFF880000000000, 0x7FC0000000]),
    pages=st.integers(2500, 6000),
    ramdisk=st.integers(0, 3000).map(lambda n: bytes(n) + b"R" * min(n, 3)),
    p2m_note=st.booleans(),
    unmapped=st.booleans(),
    seed=st.integers(0, 99),
    command=st.sampled_from([b"", b"console=hvc0", b"x" * 1023, bytes(range(1, 256))]),
)
def test_layout_holds_for_every_shape(base, pages, ramdisk, p2m_note, unmapped, seed, command) -> None:  # type: ignore[no-untyped-def]  # hypothesis fills them
    """The checker's promises hold for kernels anywhere, with any p2m order, ramdisk and notes."""
    numbers = {MOD_PFN: 1} if unmapped else {}
    if p2m_note:
        numbers[P2M] = 0x8000000000
    p2m = list(range(100, 100 + pages))
    random.Random(seed).shuffle(p2m)
    built, _ = build(request_for(kernel_at(base, numbers), p2m, ramdisk=ramdisk, cmdline=command))
    assert built.context.rip == base + 0x10


def test_hypercall_page_stubs() -> None:
    """The page holds the PV stubs: number in EAX, SYSCALL, RCX and R11 kept; iret pushes RAX, R11 and RCX
    instead."""
    built, memory = build(request_for(kernel_at(0, {HYPERCALL: 0x1000}), range(50, 4000)))
    page = memory.octets[0x1000:0x2000]
    assert built.hypercall_page == 0x1000
    assert page[17 * 32 : 17 * 32 + 14] == bytes.fromhex("51 4153 b811000000 0f05 415b 59 c3")
    assert page[23 * 32 : 23 * 32 + 11] == bytes.fromhex("51 4153 50 b817000000 0f05")
    assert page[127 * 32 + 3 : 127 * 32 + 8] == b"\xb8" + struct.pack("<I", 127)


def test_ramdisk_that_needs_another_page_table() -> None:
    """A mapped ramdisk of several MiB makes the region and its tables grow together."""
    built, _ = build(request_for(kernel_at(0), range(7, 8007), ramdisk=bytes(9 << 20)))
    assert built.virt_end >= 12 << 20


def test_large_guest_is_built_fast() -> None:
    """4 GiB with INIT_P2M: bulk work only, far below a second on an idle machine."""
    numbers = {P2M: 0x8000000000, MOD_PFN: 1}
    request = request_for(kernel_at(LINUX, numbers), range(1000, 1000 + (1 << 20)))

    class Sink:
        total = 0

        def write(self, pfn: int, offset: int, data: bytes | memoryview) -> None:
            self.total += len(data)

    sink = Sink()
    start = time.process_time()
    build_pv(request, sink)
    assert time.process_time() - start < 2.0
    assert sink.total >= 8 << 20


BAD = [
    (elf64([Seg(0, bytes(4096))], b""), "no Xen ELF notes"),
    (elf64([Seg(0, bytes(4096))], notes({BASE: 0, ENTRY: 0}), machine=183), "another machine"),
    (elf64([Seg(0, bytes(4096))], notes({BASE: 0, ENTRY: 0}), kind=1), "not an executable"),
    (elf64([Seg(0, bytes(4096))], notes({PHYS32: 0x100000})), "type pvh"),
    (kernel_at(0, {HV_START_LOW: 0xFFFF900000000000}), "HV_START_LOW"),
    (kernel_at(0xFFFF800000000000), "does not fit"),
    (kernel_at(0x800000000000), "does not fit"),
    (kernel_at(0x7FFFFFFFF000 - 0x5000), "leaves the guest's address space"),
    (kernel_at(0xFFFFFFFFFFFF0000), "leaves the guest's address space"),
    (kernel_at(0x123), "not the start of a page"),
    (kernel_at(0, {ENTRY: 0x100000}), "entry point"),
    (kernel_at(0, {HYPERCALL: 0x1234}), "hypercall page"),
    (kernel_at(0, {HYPERCALL: 0x7000}), "hypercall page"),
    (kernel_at(0, {P2M: 0x200000}), "INIT_P2M"),
    (kernel_at(0, {P2M: 0xFFFF800000000000}), "INIT_P2M"),
    (elf64([Seg(0, bytes(64), 1 << 40)], notes({BASE: 0, ENTRY: 0})), "too few"),
    (elf64([Seg(0, bytes(64), (1 << 64) - 1)], notes({BASE: 0, ENTRY: 0})), None),
    (elf64([Seg(0x1000, bytes(64))], notes({BASE: 0, ENTRY: 0x1000, PADDR_OFFSET: 0x2000})), "does not fit"),
    (elf64([Seg(0, bytes(8192)), Seg(0x1000, bytes(64))], notes({BASE: 0, ENTRY: 0})), "overlap"),
    (
        elf64([Seg(0, bytes(64))], notes({BASE: 0, ENTRY: 0}, {FEATURES: b"!auto_translated_physmap"})),
        "auto_tr",
    ),
    (elf64([Seg(0, bytes(64))], notes({BASE: 0, ENTRY: 0}, {FEATURES: b"!of_my_own"})), "unknown here"),
    (elf64([Seg(0, bytes(64))], notes({BASE: 0, ENTRY: 0}, {XEN_VERSION: b"xen-2.0"})), "xen-2.0"),
    (elf64([Seg(0, bytes(64))], notes({BASE: 0, ENTRY: 0}, {LOADER: b"odd"})), "loader"),
    (elf64([Seg(0, bytes(64))], notes({ENTRY: 0, PADDR_OFFSET: 0})), "without VIRT_BASE"),
]


@pytest.mark.parametrize(("kernel", "message"), BAD)
def test_bad_kernels_are_refused_before_anything_is_written(kernel: bytes, message: str | None) -> None:
    """Each fault of a kernel gives a BuildError of one line that names it, and no byte is written."""
    memory = Memory(4096)
    with pytest.raises(BuildError) as caught:
        build_pv(request_for(kernel, range(4096)), memory)
    assert memory.writes == 0
    assert "\n" not in str(caught.value)
    if message:
        assert message in str(caught.value)


@pytest.mark.parametrize("pages", [1, 2, 5, 100, 1023])
def test_too_little_memory(pages: int) -> None:
    """A guest whose memory does not hold the initial region is refused; 4 MiB hold the smallest."""
    with pytest.raises(BuildError, match="too few"):
        build_pv(request_for(kernel_at(0), range(pages)), Memory(pages))
    build(request_for(kernel_at(0), range(1024)))


def test_ramdisk_and_command_line_limits() -> None:
    """A ramdisk beyond memory, a command line of 1024 bytes and one with a zero byte are refused."""
    with pytest.raises(BuildError, match="the ramdisk ends at"):
        build_pv(request_for(kernel_at(0), range(1100), ramdisk=bytes(8 << 20)), Memory(1100))
    for command in (b"x" * 1024, b"a\0b"):
        with pytest.raises(BuildError, match="command line"):
            build_pv(request_for(kernel_at(0), range(1100), cmdline=command), Memory(1100))


@pytest.mark.parametrize("bad", [-1, 1 << 40, 1 << 64])
def test_wild_machine_frames(bad: int) -> None:
    """A p2m list with a number that is no frame's is refused."""
    memory = Memory(1100)
    with pytest.raises(BuildError, match="memory"):
        build_pv(request_for(kernel_at(0), [*range(1099), bad]), memory)
    assert memory.writes == 0


def test_guest_context() -> None:
    """The context for setvcpucontext names the entry, the boot stack, the start info and the root, and
    survives packing."""
    built, _ = build(request_for(kernel_at(LINUX), range(20, 4020)))
    context = VCPU_GUEST_CONTEXT.unpack(VCPU_GUEST_CONTEXT.pack(guest_context(built.context)))
    registers = context.user_regs
    assert (registers.rip, registers.rsp, registers.rsi) == (
        built.context.rip,
        built.context.rsp,
        built.context.rsi,
    )
    assert context.ctrlreg[3] == built.page_tables[0][0] << 12
    assert (context.kernel_sp, context.kernel_ss) == (registers.rsp, registers.ss)
    assert registers.rflags == 0x200
    assert registers.cs == 0xE033


@pytest.mark.parametrize(("found", "mend"), [({1: 0}, "pvshim"), ({18: 0x100000}, "type pvh")])
def test_a_32_bit_kernel_is_told_how_it_can_start(found: dict[int, int], mend: str) -> None:
    """In Xen's shim, or by its PVH entry."""
    kernel = elf32([Seg(0x100000, b"x")], notes(found))
    with pytest.raises(BuildError, match=f"32-bit 386 .*{mend}"):
        build_pv(request_for(kernel, range(4096)), Memory(4096))
