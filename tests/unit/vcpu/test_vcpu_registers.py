"""The register view: every field is the register it is named after, and RFLAGS is exact both ways."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from domains.vcpu import insides
from domains.vcpu.state import RFLAGS_FIXED, RFLAGS_MASK
from domains.vcpu.testing import CODE, PvGuest

PUSHF = bytes.fromhex("9c580f05")  # pushfq; pop rax; syscall
POPF = bytes.fromhex("509d0f05")  # push rax; popfq; syscall
ARITHMETIC_AND_DF = 0xCD5


def test_general_registers_by_number_and_name() -> None:
    """gpr and set_gpr use the numbers of machine code; values are modulo 2**64."""
    regs = PvGuest().vcpu.regs
    names = [
        "rax",
        "rcx",
        "rdx",
        "rbx",
        "rsp",
        "rbp",
        "rsi",
        "rdi",
        "r8",
        "r9",
        "r10",
        "r11",
        "r12",
        "r13",
        "r14",
        "r15",
    ]
    for number, name in enumerate(names):
        regs.set_gpr(number, (1 << 64) + number + 7)
        assert regs.gpr(number) == getattr(regs, name) == number + 7
    regs.rax = -1
    assert regs.gpr(0) == (1 << 64) - 1
    for number in (-1, 16):
        with pytest.raises(IndexError):
            regs.gpr(number)
        with pytest.raises(IndexError):
            regs.set_gpr(number, 0)


def test_guest_sees_what_the_view_wrote() -> None:
    """Each register written by the view is stored by guest code, and the other way round."""
    # mov [0x30000+8n], reg for all 16, then inc each but rsp
    stores = "".join(
        f"{0x4C if n > 7 else 0x48:02x}89{4 | (n & 7) << 3:02x}25{0x30000 + 8 * n:08x}"[:8]
        + (0x30000 + 8 * n).to_bytes(4, "little").hex()
        for n in range(16)
    )
    guest = PvGuest(bytes.fromhex(stores + "48ffc0 49ffc7 0f05".replace(" ", "")))
    values = [0x0101010101010101 * (n + 1) for n in range(16)]
    for number, value in enumerate(values):
        guest.vcpu.regs.set_gpr(number, value)
    guest.run()
    assert [guest.words[0x30000 // 8 + n] for n in range(16)] == values
    assert guest.vcpu.regs.rax == values[0] + 1
    assert guest.vcpu.regs.r15 == values[15] + 1


@pytest.fixture(scope="module")
def shared() -> PvGuest:
    """One guest for the property tests."""
    return PvGuest()


@settings(max_examples=100, deadline=None)
@given(value=st.integers(0, (1 << 64) - 1))
def test_rflags_written_is_what_pushf_stores(shared: PvGuest, value: int) -> None:
    """Any value: reserved bits drop out, the rest is what the guest's PUSHF sees."""
    wanted = value & ~0x34300  # no TF, IF stays out, no VM, RF, NT for a guest that goes on running
    shared.write(CODE, PUSHF)
    shared.restart()
    shared.vcpu.regs.rflags = wanted
    assert shared.vcpu.regs.rflags == wanted & RFLAGS_MASK | RFLAGS_FIXED
    shared.traps.seen.clear()
    shared.run()
    assert shared.vcpu.regs.rax == wanted & RFLAGS_MASK | RFLAGS_FIXED
    assert shared.vcpu.regs.rflags == wanted & RFLAGS_MASK | RFLAGS_FIXED


# name, code that leaves flags lazily, then SYSCALL
LAZY = {
    "add": "4801d8", "sub": "4829d8", "and": "4821d8", "inc": "48ffc0", "shl 3": "48c1e003", "imul":
    "480fafc3", "adc": "4811d8", "neg": "48f7d8", "add 8 bit": "00d8", "sar 16 bit": "66d1f8", "cmp 32":
    "39d8", "std; test": "fd4885d8",
}  # fmt: skip


@pytest.mark.parametrize("name", LAZY)
@settings(max_examples=25, deadline=None)
@given(a=st.integers(0, (1 << 64) - 1), b=st.integers(0, (1 << 64) - 1), carry=st.booleans())
def test_lazily_evaluated_flags(shared: PvGuest, name: str, a: int, b: int, carry: bool) -> None:
    """In the hook right after arithmetic, rflags equals what the guest's own PUSHF says a moment later."""
    seen: list[int] = []
    # <operation>; syscall; pushfq; pop rdx; syscall
    shared.write(CODE, bytes.fromhex(LAZY[name] + "0f05 9c 5a 0f05".replace(" ", "")) + bytes(8))
    shared.vcpu.drop_code(0x4000_0000 + CODE, 64)  # type: ignore[arg-type]  # a plain number is clearer here
    shared.restart()
    regs = shared.vcpu.regs
    regs.rax, regs.rbx, regs.rflags = a, b, 0x202 | carry

    def hook() -> None:
        seen.append(regs.rflags)
        if len(seen) == 2:
            shared.vcpu.request_stop()

    shared.traps.syscall = hook
    try:
        shared.run()
    finally:
        shared.traps.syscall = None
    assert seen[0] == regs.rdx
    assert seen[0] == seen[1] == regs.rflags


def test_rflags_set_in_a_hook_and_between_runs_reaches_jumps() -> None:
    """CF set in a hook decides the JC behind the SYSCALL; CF set between runs decides it too."""
    code = bytes.fromhex("0f05 7205 bb01000000 cd21".replace(" ", ""))  # syscall; jc +5; mov ebx,1; int 0x21
    for inside in (True, False):
        for carry in (0, 1):
            guest = PvGuest(code)
            regs = guest.vcpu.regs

            def hook(guest: PvGuest = guest, inside: bool = inside, carry: int = carry) -> None:
                if inside:
                    guest.vcpu.regs.rflags = 0x202 | carry
                else:
                    guest.vcpu.request_stop()

            guest.traps.syscall = hook
            guest.run()
            if not inside:
                regs.rflags = 0x202 | carry
                guest.run()
            assert regs.rbx == 1 - carry


def test_unknown_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version, or machine code that does not look as expected: a clear error, no guess."""
    monkeypatch.setattr(insides, "VERSION", "2.2.0")
    insides.offsets.cache_clear()
    try:
        with pytest.raises(insides.UnknownUnicorn, match=r"2\.1\.4.*needs unicorn==2\.2\.0"):
            insides.offsets()
        monkeypatch.undo()
        real = insides.library().code
        monkeypatch.setattr(
            insides.Library,
            "code",
            lambda self, name, size: b"\x90" * size if "interrupt" in name else real(name, size),
        )
        with pytest.raises(insides.UnknownUnicorn, match="does not show"):
            insides.offsets()
    finally:
        monkeypatch.undo()
        insides.offsets.cache_clear()
        insides.offsets()
