"""Data breakpoints: #DB behind the instruction that touched the watched bytes, once for each time, whatever the instruction, and however
its run was cut up."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest

from domains.vcpu.api import StopReason, Trap
from domains.vcpu.hvm_testing import HANDLERS, HvmGuest
from domains.vcpu.testing import CODE, STACK, PvGuest
from tests.unit.vcpu.hvm_programs import protected_mode

DATA = 0x30000
WRITE, ACCESS = 1, 3
LENGTH = {1: 0, 2: 1, 8: 2, 4: 3}
MOV_RAX_DATA = b"\x48\xb8" + struct.pack("<Q", DATA)
UD2 = b"\x0f\x0b"


def control(*watches: tuple[int, int]) -> int:
    """DR7 of (kind, bytes) for DR0 on."""
    value = 0x400
    for number, (kind, size) in enumerate(watches):
        value |= 1 << 2 * number | kind << 16 + 4 * number | LENGTH[size] << 18 + 4 * number
    return value


class Watched:
    """A PV guest whose #DBs are kept as (RIP, DR6), and which goes on after each."""

    def __init__(self, code: bytes, *watches: tuple[int, int, int]) -> None:
        """`watches`: (address, kind, bytes) each."""
        self.guest = PvGuest(code)
        self.hits: list[tuple[int, int]] = []
        self.on_hit: Callable[[], None] = lambda: None
        self.guest.traps.trap = self._trap
        self.watch(*watches)

    def watch(self, *watches: tuple[int, int, int]) -> None:
        addresses = [address for address, *_ in watches] + [0] * (4 - len(watches))
        self.guest.vcpu.set_breakpoints(addresses, control(*((kind, size) for _, kind, size in watches)))

    def _trap(self, trap: Trap) -> None:
        assert trap.vector == 1, trap
        self.hits.append((self.guest.vcpu.regs.rip, self.guest.vcpu.debug_status()))
        self.on_hit()

    def run(self) -> list[tuple[int, int]]:
        """To UD2."""
        assert self.guest.run() is StopReason.REQUESTED
        assert [kind for kind, *_ in self.guest.traps.seen] == ["invalid"]
        return self.hits


@pytest.mark.parametrize(
    ("instruction", "writes"),
    [
        ("488918", True),  # mov [rax], rbx
        ("8818", True),  # mov [rax], bl
        ("488b18", False),  # mov rbx, [rax]
        ("48ff00", True),  # inc qword [rax]
        ("f0480fc118", True),  # lock xadd [rax], rbx
        ("488718", True),  # xchg [rax], rbx
        ("480fab18", True),  # bts [rax], rbx
        ("0f1100", True),  # movups [rax], xmm0
        ("0f1000", False),  # movups xmm0, [rax]
        ("483918", False),  # cmp [rax], rbx
        ("4889c6", None),  # mov rsi, rax
        ("ff30", False),  # push qword [rax]
        ("8f00", True),  # pop qword [rax]
        ("0fae00", True),  # fxsave [rax]
        ("dd18", True),  # fstp qword [rax]
    ],
)
@pytest.mark.parametrize("kind", [WRITE, ACCESS])
def test_instructions_that_touch_the_bytes(instruction: str, writes: bool | None, kind: int) -> None:
    """Each is run twice: with cold and with warm translations."""
    code = bytes.fromhex(instruction)
    start = MOV_RAX_DATA + b"\xb9\x02\x00\x00\x00"  # mov ecx, 2
    loop = b"\x90" + code + b"\x90\xff\xc9\x75"  # dec ecx; jnz
    at = CODE + len(start) + 1 + len(code)
    watched = Watched(start + loop + bytes([(-len(loop) - 1) & 0xFF]) + UD2, (DATA, kind, 8))
    hit = writes is not None and (writes or kind == ACCESS)
    assert watched.run() == ([(at, 1)] * 2 if hit else [])


def test_an_instruction_that_hits_has_happened_once() -> None:
    watched = Watched(MOV_RAX_DATA + bytes.fromhex("48ff00 488b18 48ff00") + UD2, (DATA, WRITE, 8))
    assert len(watched.run()) == 2
    assert watched.guest.words[DATA // 8] == 2
    assert watched.guest.vcpu.regs.rbx == 1


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_byte_of_it_is_enough_and_its_neighbours_are_not(size: int) -> None:
    """Bytes written one at a time around it; and the bits of the address below the length do not count."""
    first = DATA + 16
    code = (
        MOV_RAX_DATA + bytes.fromhex("b920000000") + bytes.fromhex("880c08 ffc9 79f9") + UD2
    )  # mov [rax+rcx],cl
    for address in (first, first + size - 1):
        watched = Watched(code, (address, WRITE, size))
        assert len(watched.run()) == size
        assert watched.guest.memory[DATA : DATA + 33] == bytes(range(33))
    # A wide access that only overlaps.
    wide = Watched(MOV_RAX_DATA + bytes.fromhex("48895809") + UD2, (first, WRITE, size))  # mov [rax + 9], rbx
    assert len(wide.run()) == 1
    beside = Watched(MOV_RAX_DATA + bytes.fromhex("48895808") + UD2, (first, WRITE, size))
    assert beside.run() == []


def test_an_access_across_two_pages() -> None:
    edge = DATA + 0x1000
    code = MOV_RAX_DATA + bytes.fromhex("488998fc0f0000") + UD2  # mov [rax + 0xffc], rbx
    for address in (edge - 4, edge):
        assert len(Watched(code, (address, WRITE, 4)).run()) == 1
    assert Watched(code, (edge + 4, WRITE, 4)).run() == []


def test_one_instruction_that_hits_two_shows_both() -> None:
    """MOVSQ from one to the other; and two on one word."""
    code = (
        MOV_RAX_DATA + bytes.fromhex("4889c6 488d7840 48a5") + UD2
    )  # mov rsi, rax; lea rdi, [rax + 64]; movsq
    assert Watched(code, (DATA, ACCESS, 8), (DATA + 64, WRITE, 8)).run() == [(CODE + 19, 3)]
    same = MOV_RAX_DATA + bytes.fromhex("488918") + UD2
    assert Watched(same, (DATA, WRITE, 4), (DATA + 16, WRITE, 8), (DATA + 4, ACCESS, 2)).run() == [
        (CODE + 13, 5)
    ]


def test_what_one_instruction_hit_is_not_shown_with_the_next() -> None:
    code = MOV_RAX_DATA + bytes.fromhex("488918 48895810 90") + UD2
    hits = Watched(code, (DATA, WRITE, 8), (DATA + 16, WRITE, 8)).run()
    assert hits == [(CODE + 13, 1), (CODE + 17, 2)]


def test_every_step_of_a_string_instruction_hits() -> None:
    """RIP stays at REP until it is through; RCX shows how far it is."""
    code = (
        MOV_RAX_DATA + bytes.fromhex("4889c7 b908000000 f348ab") + UD2
    )  # mov rdi, rax; mov ecx, 8; rep stosq
    watched = Watched(code, (DATA + 16, WRITE, 8), (DATA + 56, WRITE, 8))
    left: list[int] = []
    watched.on_hit = lambda: left.append(watched.guest.vcpu.regs.rcx)
    assert [status for _, status in watched.run()] == [1, 2]
    assert left == [5, 0]
    assert watched.guest.words[DATA // 8 : DATA // 8 + 8].tolist() == [DATA] * 8


def test_jumps_calls_and_returns_through_watched_memory() -> None:
    """They end a block and go to the next without a look at requests, where its place is known: many rounds."""
    # mov rbx, 100; l: call [rax]; dec ebx; jnz l; ud2 ... f: ret
    body = MOV_RAX_DATA + bytes.fromhex("bb64000000 ff10 ffcb 75fa") + UD2
    watched = Watched(body, (DATA, ACCESS, 8))
    target = CODE + 0x800
    watched.guest.write(target, b"\xc3")
    watched.guest.words[DATA // 8] = target
    assert watched.run() == [(target, 1)] * 100

    stack = Watched(body, (STACK - 8, ACCESS, 8))
    stack.guest.write(target, b"\xc3")
    stack.guest.words[DATA // 8] = target
    assert stack.run() == [(target, 1), (CODE + 17, 1)] * 100


def test_nothing_is_fetched_from_it_and_code_beside_it_runs() -> None:
    """Watched bytes in the page of the code: fetching does not count, and a store there does."""
    code = MOV_RAX_DATA.replace(struct.pack("<Q", DATA), struct.pack("<Q", CODE + 0x100)) + bytes.fromhex(
        "488918 90"
    )
    watched = Watched(code + UD2, (CODE, ACCESS, 8), (CODE + 0x100, WRITE, 8))
    assert watched.run() == [(CODE + 13, 2)]


def test_taken_back_and_moved() -> None:
    watched = Watched(MOV_RAX_DATA + bytes.fromhex("488918 48895810") + UD2, (DATA, WRITE, 8))
    assert watched.run() == [(CODE + 13, 1)]
    for watches, expected in (([], []), ([(DATA + 16, WRITE, 8)], [(CODE + 17, 1)]), ([], [])):
        watched.hits.clear()
        watched.guest.traps.seen.clear()
        watched.watch(*watches)
        watched.guest.restart()
        assert watched.run() == expected


def test_a_single_step_onto_a_hit_shows_both() -> None:
    watched = Watched(MOV_RAX_DATA + bytes.fromhex("488918 90") + UD2, (DATA, WRITE, 8))
    watched.guest.vcpu.regs.rflags |= 0x100
    assert watched.run() == [(CODE + 10, 0x4000), (CODE + 13, 0x4001), (CODE + 14, 0x4000)]


@pytest.mark.parametrize("seed", range(4))
def test_slices_and_bells_lose_and_repeat_nothing(seed: int) -> None:
    """A loop of stores, cut into runs of a few blocks, with bells: as many #DBs as stores, and as many stores as rounds."""
    # mov ebx, 500; l: inc qword [rax]; nop; dec ebx; jnz l
    code = MOV_RAX_DATA + bytes.fromhex("bbf4010000 48ff00 90 ffcb 75f8") + UD2
    watched = Watched(code, (DATA, WRITE, 8))
    chance = random.Random(seed)
    vcpu = watched.guest.vcpu
    for _ in range(20_000):
        if chance.random() < 0.1:
            vcpu.ring()
        reason = vcpu.run(chance.randint(1, 4))
        if reason is StopReason.BELL:
            vcpu.clear_bell()
        elif reason is StopReason.REQUESTED:
            break
    assert reason is StopReason.REQUESTED
    assert watched.guest.words[DATA // 8] == 500
    assert watched.hits == [(CODE + 18, 1)] * 500


def test_a_fault_of_the_instruction_comes_alone() -> None:
    """A store that is not allowed hits nothing."""
    watched = Watched(MOV_RAX_DATA + bytes.fromhex("488918") + UD2, (DATA, WRITE, 8))
    guest = watched.guest
    guest.set_entry(DATA, 0)
    guest.vcpu.flush_tlb()
    guest.traps.trap = None
    assert guest.run() is StopReason.REQUESTED
    [(kind, trap, rip)] = guest.traps.seen
    assert (kind, rip) == ("trap", CODE + 10)
    assert isinstance(trap, Trap)
    assert trap.vector == 14
    assert guest.vcpu.debug_status() == 0


# ---------------------------------------------------------------------- HVM: the guest writes its registers itself


# mov rax, imm32; mov dr, rax
def _mov_dr(register: int, value: int) -> str:
    return (b"\x48\xc7\xc0" + struct.pack("<i", value) + bytes([0x0F, 0x23, 0xC0 | register << 3])).hex()


COUNT_HITS = "ffc3 4c8b0c24 0f21f0 48cf"
"""inc ebx; mov r9, [rsp]; mov rax, dr6; iretq"""
STOP = "e6f4 ebfe"


def hvm(code: str) -> HvmGuest:
    guest = HvmGuest()
    guest.long_mode("31db" + code + STOP)
    guest.handler(1, COUNT_HITS)
    return guest


def test_an_hvm_single_step_onto_a_hit_is_one_exception() -> None:
    """Four steps behind POPF, of which one shows the watchpoint as well."""
    data = 0x60000
    guest = hvm(
        _mov_dr(0, data) + _mov_dr(7, control((WRITE, 8))) + "6802010000 9d 48ff042500000600 90 6a02 9d"
    )
    guest.handler(1, "ffc3 0f21f0 a801 7403 41ffc4 31c0 0f23f0 48cf")  # B0 of DR6: inc r12d; then dr6 = 0
    guest.vcpu.regs.r12 = 0
    assert guest.run() is StopReason.REQUESTED
    # INC, NOP, PUSH, and the POPF that takes TF back.
    assert (guest.vcpu.regs.rbx & 0xFFFFFFFF, guest.vcpu.regs.r12 & 0xFFFFFFFF) == (4, 1)


def test_an_hvm_guest_watches_and_stops_watching() -> None:
    data = 0x60000
    store = "48ff042500000600"  # inc qword [data]
    guest = hvm(
        _mov_dr(0, data) + _mov_dr(7, control((WRITE, 8))) + store + "90" + store + _mov_dr(7, 0x400) + store
    )
    assert guest.run() is StopReason.REQUESTED
    assert guest.vcpu.regs.rbx & 0xFFFFFFFF == 2
    assert guest.qword(data) == 3
    assert guest.vcpu.debug_registers()[4] & 0xF == 1


def test_a_register_that_moves_while_it_is_armed() -> None:
    data = 0x60000
    guest = hvm(
        _mov_dr(0, data + 64)
        + _mov_dr(7, control((WRITE, 8)))
        + "48ff042500000600"
        + _mov_dr(0, data)
        + "48ff042500000600"
    )
    assert guest.run() is StopReason.REQUESTED
    assert guest.vcpu.regs.rbx & 0xFFFFFFFF == 1


def test_an_interrupt_whose_frame_is_watched_is_not_lost() -> None:
    """The frame cannot be pushed again: #DB comes when the interrupt has been delivered, in front of its handler."""
    guest = hvm(_mov_dr(0, 0x7000 - 8) + _mov_dr(7, control((WRITE, 8))) + "fb 90 90 90 90")
    guest.handler(0x20, "41ffc4 48cf")  # inc r12d; iretq
    guest.vcpu.regs.r12 = 0
    guest.vcpu.inject_interrupt(0x20)
    assert guest.run() is StopReason.REQUESTED
    assert guest.vcpu.regs.r12 & 0xFFFFFFFF == 1
    assert guest.vcpu.regs.rbx & 0xFFFFFFFF == 1
    assert guest.vcpu.regs.r9 == HANDLERS + 64 * 0x20


def test_an_exception_whose_frame_is_watched_is_delivered_once() -> None:
    guest = hvm(_mov_dr(0, 0x7000 - 16) + _mov_dr(7, control((WRITE, 8))) + "cc 90 cd21 90")
    guest.handler(3, "41ffc4 48cf")
    guest.handler(0x21, "41ffc5 48cf")
    guest.vcpu.regs.r12 = guest.vcpu.regs.r13 = 0
    assert guest.run() is StopReason.REQUESTED
    counts = guest.vcpu.regs.r12 & 0xFFFFFFFF, guest.vcpu.regs.r13 & 0xFFFFFFFF
    assert counts == (1, 1)
    assert guest.vcpu.regs.rbx & 0xFFFFFFFF >= 2


def test_breakpoints_follow_an_hvm_vcpu() -> None:
    """Two contexts of one object: one watches, the other writes as it likes."""
    store = "48ff042500000600"
    guest = hvm(_mov_dr(0, 0x60000) + _mov_dr(7, control((WRITE, 8))) + "e610 eb00 " + store + "90" + STOP)
    guest.exits.on_out_hooks[0x10] = guest.vcpu.request_stop
    assert guest.run() is StopReason.REQUESTED
    first = guest.vcpu.save_context()
    guest.vcpu.reset()
    guest.write(0x50000, "66ff06 0080 ebf9")  # l: inc dword [0x8000]; jmp l
    guest.vcpu.enter_startup(0x50)
    second = guest.vcpu.save_context()
    assert guest.vcpu.debug_registers()[5] & 0xFF == 0
    assert guest.run(50) is StopReason.SLICE
    guest.vcpu.load_context(first)
    assert guest.run() is StopReason.REQUESTED
    assert guest.vcpu.regs.rbx & 0xFFFFFFFF == 1
    first = guest.vcpu.save_context()
    guest.vcpu.load_context(second)
    assert guest.run(50) is StopReason.SLICE


# ---------------------------------------------------------------------- MOV SS and POP SS

SELECTOR = 0x60000


def shadowed(code: str, **handlers: str) -> HvmGuest:
    """A guest that watches the selector at SELECTOR; R9 of the last #DB is where it came, EBX how often."""
    guest = hvm(_mov_dr(0, SELECTOR) + _mov_dr(7, control((ACCESS, 4))) + code)
    guest.memory[SELECTOR] = 0x10
    for vector, handler in handlers.items():
        guest.handler(int(vector[1:], 16), handler)
    assert guest.run() is StopReason.REQUESTED
    assert guest.vcpu.regs.rbx & 0xFFFFFFFF == 1
    return guest


START = len(bytes.fromhex("31db" + _mov_dr(0, SELECTOR) + _mov_dr(7, control((ACCESS, 4)))))
MOV_SS = "8e142500000600"  # mov ss, [SELECTOR]


@pytest.mark.parametrize(
    ("code", "at"),
    [
        ("8b042500000600 90", 7),  # mov eax, [SELECTOR]
        (MOV_SS + "90 90", 8),
        (MOV_SS + "e900000000 90", 12),  # jmp
        (MOV_SS + "50 58", 8),  # push rax: on the new stack
        (MOV_SS + "8b042500000600 90", 14),  # the next one hits, too: one #DB for both
    ],
)
def test_a_hit_of_mov_ss_is_told_behind_the_next_instruction(code: str, at: int) -> None:
    guest = shadowed(code)
    assert guest.vcpu.regs.r9 - guest.body == START + at
    assert guest.vcpu.debug_registers()[4] & 0xF == 1


@pytest.mark.parametrize(("code", "vector"), [("cd21", 0x21), ("cc", 3)])
def test_an_interrupt_instruction_behind_mov_ss_comes_first(code: str, vector: int) -> None:
    """#DB in front of its handler, whatever privilege it had: what XSA-260 is about."""
    guest = shadowed(MOV_SS + code + "90", **{f"v{vector:x}": "41ffc5 48cf"})
    assert guest.vcpu.regs.r9 == HANDLERS + 64 * vector


def test_pop_ss_in_protected_mode() -> None:
    guest = HvmGuest()
    handler = "43 8b0c24 cf"  # inc ebx; mov ecx, [esp]; iret
    # xor ebx, ebx; mov eax, SELECTOR; mov dr0, eax; mov eax, 1 | RW, four bytes; mov dr7, eax
    setup = "31db b800000600 0f23c0 b801000f00 0f23f8"
    # mov esp, SELECTOR; pop ss; mov esp, STACK
    protected_mode(guest, setup + "bc00000600 17 bc00700000 90" + STOP)
    guest.handler(1, handler)
    guest.memory[SELECTOR] = 0x10
    assert guest.run() is StopReason.REQUESTED
    assert guest.vcpu.regs.rbx & 0xFFFFFFFF == 1
    body = bytes(guest.memory[0x8000:0x8100]).index(bytes.fromhex("bc00000600"))
    assert guest.vcpu.regs.rcx & 0xFFFFFFFF == 0x8000 + body + 5 + 1 + 5


@pytest.mark.parametrize("seed", range(3))
def test_stops_between_mov_ss_and_its_next_instruction_lose_nothing(seed: int) -> None:
    """A loop that is cut into runs of a few blocks, with bells."""
    # mov r8d, 300; l: mov ss, [SELECTOR]; nop; dec r8d; jnz l
    guest = hvm(
        _mov_dr(0, SELECTOR) + _mov_dr(7, control((ACCESS, 4))) + "41b82c010000" + MOV_SS + "90 41ffc8 75f3"
    )
    guest.memory[SELECTOR] = 0x10
    chance = random.Random(seed)
    vcpu = guest.vcpu
    for _ in range(50_000):
        if chance.random() < 0.1:
            vcpu.ring()
        reason = vcpu.run(chance.randint(1, 3))
        if reason is StopReason.BELL:
            vcpu.clear_bell()
        elif reason is StopReason.REQUESTED:
            break
    assert reason is StopReason.REQUESTED
    assert vcpu.regs.rbx & 0xFFFFFFFF == 300


@pytest.mark.parametrize("offset", [0x201, 0x211, 0x0F5, 0x0FD, 0x0FF, 0x101, 0x107, 0x109])
def test_a_store_that_is_not_aligned_hits_what_it_touches_alone(offset: int) -> None:
    """INC of four bytes, in a page whose bytes 0x100 to 0x107 are watched."""
    watched = Watched(
        MOV_RAX_DATA + bytes.fromhex("ff80") + struct.pack("<I", offset) + UD2, (DATA + 0x100, WRITE, 8)
    )
    touched = offset < 0x108 and offset + 4 > 0x100
    assert watched.run() == ([(CODE + 16, 1)] if touched else [])
    assert watched.guest.memory[DATA + offset : DATA + offset + 4] == b"\x01\x00\x00\x00"
