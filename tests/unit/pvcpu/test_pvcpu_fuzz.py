"""Whatever a guest puts in its registers: a hypercall gives a value, nothing is raised, and the page types stay sound."""

from __future__ import annotations

import struct

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bus.abi.errno import XEN_ENOSYS
from bus.abi.hypercalls import HYPERCALLS
from bus.addresses import Mfn
from domains.pv.api import Continuation
from domains.pv.calls import NO_RESULT
from tests.unit.pvcpu.rig import BASE, CODE, DATA, KERNEL_STACK, UNMAPPED, USER_L4, VIRT, Rig

INTERESTING = [
    0, 1, 2, 3, 7, 63, 64, 0x7FF0, DATA, DATA + 1, DATA + 4090, VIRT + 3 * 4096, CODE, UNMAPPED, KERNEL_STACK, BASE + 3,
    BASE + 20, BASE << 12, (BASE + 3) << 12, (BASE + 20) << 12 | 0x67, 1 << 31, (1 << 32) - 1, 1 << 47, 1 << 63, (1 << 64) - 1,
    0xFFFF_8000_0000_0000, 0xFFFF_8200_0000_0000,
]  # fmt: skip
WORD = st.one_of(st.sampled_from(INTERESTING), st.integers(0, 64), st.integers(0, (1 << 64) - 1))
CALL = st.tuples(st.sampled_from(sorted(HYPERCALLS)), WORD, WORD, WORD, WORD, WORD)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(CALL, max_size=12), st.lists(WORD, min_size=16, max_size=64), st.integers(-40, 5))
def test_any_hypercall(calls: list[tuple[int, ...]], content: list[int], answer: int) -> None:
    rig = Rig(2)
    rig.upstream.answer = lambda nr, cmd, data: (answer, data if answer >= 0 else b"")
    rig.put(DATA, struct.pack(f"<{len(content)}Q", *content))
    for number, *args in calls:
        result = rig.domain.calls.call(number, *args)
        assert isinstance(result, int | Continuation) or result is NO_RESULT
        if isinstance(result, int) and result < 0:
            assert result >= -XEN_ENOSYS * 100
        if rig.domain.finished:
            break
    assert rig.domain.mmu.check_invariants() == []


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(min_size=1, max_size=40), st.booleans())
def test_any_machine_code(code: bytes, user: bool) -> None:
    """Random instructions end in a stop, a handler or a crash of the domain; never in an exception here."""
    rig = Rig()
    for vector in range(32):
        rig.handler(vector)
    rig.state.syscall_callback = rig.state.trap_address[6]
    rig.put(CODE, code + b"\x0f\x0b")
    if user:
        assert rig.domain.mmu.take_root(BASE + USER_L4) == 0
        rig.state.user_root = Mfn(BASE + USER_L4)
        rig.state.kernel_sp = KERNEL_STACK
        rig.cpu.toggle_mode()
    rig.regs.rip = CODE
    for _ in range(3):  # it may loop for ever
        if rig.stopped or rig.domain.finished:
            break
        rig.domain.run_slice()
    assert rig.domain.mmu.check_invariants() == []
