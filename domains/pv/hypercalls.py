"""The dispatcher: 64 numbers, the table of hypercalls behind those that do nothing here, and multicall (xen.h)."""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import Final

from bus.abi.errno import XEN_EFAULT, XEN_EINVAL, XEN_ENOSYS
from bus.abi.xen import MULTICALL_ENTRY, HYPERVISOR_multicall
from bus.trace import Kind, Trace, off
from domains.pv.api import Continuation, GuestFault
from domains.pv.calls import LOW32, MASK64, NO_RESULT, Handler, Result
from domains.pv.cpu import Cpu

NUMBERS: Final = 64
CHUNK: Final = 64
"""Entries of a multicall that are read at once."""
MAX_MULTICALL: Final = 1 << 20
_ENTRIES: Final = Struct("<8Q")
_RESULT: Final = Struct("<Q").pack
_SIZE: Final = MULTICALL_ENTRY.size
_RESULT_OFFSET: Final = MULTICALL_ENTRY.offset("result")
_ARGS_OFFSET: Final = MULTICALL_ENTRY.offset("args")


def no_such_hypercall(a1: int, a2: int, a3: int, a4: int, a5: int) -> Result:
    """A number that is not there."""
    return -XEN_ENOSYS


class Hypercalls:
    """`table[number]` handles a hypercall; `counts[number]` says how often it was made, those in multicalls included."""

    def __init__(self, cpu: Cpu, handlers: Mapping[int, Handler]) -> None:
        self._cpu = cpu
        self.table: Final[list[Handler]] = [
            handlers.get(number, no_such_hypercall) for number in range(NUMBERS)
        ]
        self.counts: Final = [0] * NUMBERS
        self.table[HYPERVISOR_multicall] = self.multicall
        self._in_multicall = False
        self.trace: Trace = off()

    def call(self, number: int, a1: int, a2: int, a3: int, a4: int, a5: int) -> Result:
        """One hypercall of the current vCPU; a guest address that leads nowhere is -EFAULT."""
        if number >= NUMBERS:
            return -XEN_ENOSYS
        self.counts[number] += 1
        if self.trace.on[0]:
            return self._watched(number, a1, a2, a3, a4, a5)
        try:
            return self.table[number](a1, a2, a3, a4, a5)
        except GuestFault:
            return -XEN_EFAULT

    def _watched(self, number: int, a1: int, a2: int, a3: int, a4: int, a5: int) -> Result:
        """The same, noted."""
        trace, vcpu = self.trace, self._cpu.current.id
        began = trace.now()
        try:
            result = self.table[number](a1, a2, a3, a4, a5)
        except GuestFault:
            result = -XEN_EFAULT
        self.note(vcpu, number, a1, began, result)
        return result

    def note(self, vcpu: int, number: int, first: int, began: int, result: Result) -> None:
        """For the trace: a hypercall that `began` then is over."""
        value = result if isinstance(result, int) else 0
        self.trace.add(Kind.CALL, vcpu, 0, number, first, self.trace.now() - began, value, time=began)

    def multicall(self, calls: int, count: int, a3: int, a4: int, a5: int) -> Result:
        """Each entry as its own call, its value in `result`. -EINVAL inside another multicall, -EFAULT where the list is not
        there. An entry that is iret does not come back, and ends the list."""
        if self._in_multicall:
            return -XEN_EINVAL
        count &= LOW32
        if count > MAX_MULTICALL:
            return -XEN_EINVAL
        self._in_multicall = True
        try:
            return self._run(calls, count)
        finally:
            self._in_multicall = False

    def _run(self, calls: int, count: int) -> Result:
        cpu = self._cpu
        memory = cpu.mmu
        done = 0
        while done < count:
            number = min(CHUNK, count - done)
            place = calls + done * _SIZE
            entries = memory.read_virtual(place, number * _SIZE)
            for op, _, a1, a2, a3, a4, a5, _ in _ENTRIES.iter_unpack(entries):
                result: Result
                if op < NUMBERS:
                    self.counts[op] += 1
                    try:
                        result = self.table[op](a1, a2, a3, a4, a5)
                    except GuestFault:
                        result = -XEN_EFAULT
                else:
                    result = -XEN_ENOSYS
                if result is NO_RESULT:
                    return NO_RESULT
                if isinstance(result, Continuation):
                    # This entry goes on with other arguments, and the list with it.
                    memory.write_virtual(place + _ARGS_OFFSET, b"".join(map(_RESULT, result.args)))
                    return Continuation((place, count - done))
                assert isinstance(result, int)
                memory.write_virtual(place + _RESULT_OFFSET, _RESULT(result & MASK64))
                place += _SIZE
                done += 1
                if cpu.crash_reason is not None:
                    return 0
        return 0
