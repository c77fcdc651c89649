"""Breakpoints: a guest's debug registers given to QEMU's own breakpoints and watchpoints.

QEMU's `cpu_x86_update_dr7` sets one for each of DR0 to DR3 that DR7 enables. For execution it drops all translations; code translated from
then on raises #DB in front of the instruction unless RFLAGS.RF is set. Data breakpoints are in `watchpoints.py`: #DB behind the
instruction. DR6 says which it was. The lists belong to the instance, not to a context: a PV guest's are set before each run and disarmed
by who changes vCPUs; an HVM guest writes its registers itself, and they are taken up with its context.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from typing import Final

from unicorn import x86_const

from domains.vcpu import insides

ENABLED: Final = 0xFF
"""DR7: local and global enable bits of the four."""
DR7_RESET: Final = 0x400
STATUS: Final = 0x400F
"""DR6: which breakpoint, and BS."""
# helper_single_step: or qword [rdi + dr6], 0x4000 (BS).
_DR6: Final = re.compile(rb"\x48\x81\x8f(....)\x00\x40\x00\x00", re.DOTALL)
# helper_set_dr: lea r14, [r13 + places]; mov rsi, [r12 + 8 * r14 + 8]: what was set for the register in r13, of the state in r12.
_PLACE: Final = re.compile(rb"\x4d\x8d\xb5(....)\x4b\x8b\x74\xf4\x08", re.DOTALL)
_SET_DR_BYTES: Final = 0x160
_BACK: Final = 6 * 8
"""From DR6 back to DR0."""


class Breakpoints:
    """Of one instance, between runs. DR0 to DR7 are eight words of the CPU state, and behind them four pointers to what was set for
    them. UnknownUnicorn if the library does not show where its debug registers are."""

    def __init__(self, machine: object, env: int) -> None:
        lib = insides.library()
        found = _DR6.search(lib.code("helper_single_step_x86_64", 0x20))
        if found is None:
            raise insides.UnknownUnicorn(
                f"{insides.described()}: helper_single_step does not show where DR6 is"
            )
        self._env: Final = env
        first = env + int.from_bytes(found.group(1), "little") - _BACK
        self._registers: Final = (ctypes.c_uint64 * 8).from_address(first)
        self._set: Final = (ctypes.c_uint64 * 4).from_address(first + 8 * 8)
        place = _PLACE.search(lib.code("helper_set_dr_x86_64", _SET_DR_BYTES))
        if place is None or 8 * int.from_bytes(place.group(1), "little") + 8 != first - env + 8 * 8:
            raise insides.UnknownUnicorn(
                f"{insides.described()}: what is set for the debug registers is not kept behind them"
            )
        self._registers[2] = 0x1357_9BDF_2468
        seen = machine.reg_read(x86_const.UC_X86_REG_DR2)  # type: ignore[attr-defined]  # unicorn has no types
        self._registers[2] = 0
        if seen != 0x1357_9BDF_2468:
            raise insides.UnknownUnicorn(f"{insides.described()}: DR2 is not where DR6 points at")
        self._update: Final = lib.held("cpu_x86_update_dr7_x86_64", None, ctypes.c_void_p, ctypes.c_uint32)
        self._armed: tuple[int, ...] = ()

    @property
    def armed(self) -> bool:
        """Any breakpoint is set."""
        return bool(self._armed)

    def set(self, addresses: Sequence[int], control: int) -> None:
        """DR0 to DR3, and DR7. Nothing happens if they are armed so already, or were not and are not to be."""
        wanted = (*addresses, control) if control & ENABLED else ()
        if wanted == self._armed:
            return
        if self._armed:
            self._update(self._env, DR7_RESET)
        self._armed = wanted
        if wanted:
            self._registers[0:4] = list(wanted[:4])
            self._update(self._env, control)

    def put_away(self) -> None:
        """Another vCPU's registers are to come: what these have set goes."""
        if self._registers[7] & ENABLED:
            self._update(self._env, DR7_RESET)

    def take_up(self) -> None:
        """These registers came with a context: set what they say."""
        control = self._registers[7]
        if control & ENABLED:
            self._set[0:4] = [0] * 4
            self._registers[7] = DR7_RESET
            self._update(self._env, control)

    def status(self) -> int:
        """Why the last #DB came, as DR6 has it, and forget it."""
        value = self._registers[6] & STATUS
        self._registers[6] &= ~STATUS
        return value
