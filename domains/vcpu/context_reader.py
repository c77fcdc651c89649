"""Looks into contexts that `Machine.save_context` made, without the instance that they are of: also while that one runs.

The state is copied to an instance of its own that never runs anything, and read there by the same functions as that of the vCPU itself. The
host pointers in it are not followed, and the instance's own state is back before anything else happens to it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from unicorn import x86_const

from domains.vcpu import insides
from domains.vcpu.api import VcpuError
from domains.vcpu.extended import ExtendedState
from domains.vcpu.state import EnvRegisters, view

_DEBUG: Final = tuple(getattr(x86_const, f"UC_X86_REG_DR{number}") for number in (0, 1, 2, 3, 6, 7))


def debug_registers(machine: Any) -> tuple[int, ...]:
    """DR0 to DR3, DR6, DR7 of an instance."""
    return tuple(int(machine.reg_read(number)) for number in _DEBUG)


class ContextReader:
    """One for a process; making it costs about a millisecond."""

    def __init__(self) -> None:
        found = insides.offsets()
        self._machine: Final = insides.open_machine()
        self._env: Final = insides.env_address(self._machine, found)
        self._size: Final = found.uc
        self._own: Final = ctypes.string_at(self._env, self._size)
        self._extended: Final = ExtendedState(insides.uc_address(self._machine))
        self.regs: Final[EnvRegisters] = view(self._env, found)
        """Of the context that is held."""

    @contextmanager
    def holding(self, context: bytes) -> Iterator[ContextReader]:
        """Have the state of that context to read from. VcpuError if it is none."""
        if len(context) < self._size:
            raise VcpuError(f"a context of {len(context)} bytes")
        ctypes.memmove(self._env, context, self._size)
        try:
            yield self
        finally:
            ctypes.memmove(self._env, self._own, self._size)

    def save_extended(self) -> bytes:
        """See `Vcpu.save_extended`."""
        return self._extended.save()

    def debug_registers(self) -> tuple[int, ...]:
        """See UnicornHvmVcpu."""
        return debug_registers(self._machine)
