"""Time of a PV domain: its TSC, the pvclock in vcpu_info, the wall clock in the shared info, run-state accounting, and the
guest-memory copies of both.

The guest's TSC counts nanoseconds of Xen system time (1 GHz), and the pvclock parameters say just that, so that the guest's
own formula, `system_time + (((tsc - tsc_timestamp) << shift) * mul >> 32)`, gives exactly the time that timers are set by:
no timer fires early by the guest's clock, and no drift can make one fire for ever. Sources: vcpu_time_info and shared_info
in xen.h, vcpu_runstate_info in vcpu.h.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final

from bus.abi.vcpu import (
    VCPU_RUNSTATE_INFO,
    RUNSTATE_blocked,
    RUNSTATE_offline,
    RUNSTATE_runnable,
    vcpu_runstate_info,
)
from bus.abi.xen import SHARED_INFO, VCPU_INFO, VCPU_TIME_INFO, XEN_PVCLOCK_TSC_STABLE_BIT, vcpu_time_info
from domains.pv.api import GuestFault
from domains.pv.cpu import Cpu
from domains.pv.state import VcpuState
from domains.vcpu.api import Vcpu

TSC_HZ: Final = 1_000_000_000
TSC_TO_SYSTEM_MUL: Final = 1 << 31
TSC_SHIFT: Final = 1
TIME_OFFSET: Final = VCPU_INFO.offset("time")
WALL_CLOCK_OFFSET: Final = SHARED_INFO.offset("wc_version")
_VERSION: Final = Struct("<I")
_WALL: Final = Struct("<III")
_NS: Final = 1_000_000_000


def pvclock(info: vcpu_time_info, tsc: int) -> int:
    """System time (ns) at `tsc` by the guest's own formula (xen.h, vcpu_time_info)."""
    delta = tsc - info.tsc_timestamp
    delta = delta << info.tsc_shift if info.tsc_shift >= 0 else delta >> -info.tsc_shift
    return info.system_time + (delta * info.tsc_to_system_mul >> 32)


def _no_clock() -> int:
    raise RuntimeError("the domain has no clock yet")


class Timekeeper:
    """The domain's clocks. `now` gives Xen system time in ns (monotonic), `wall` the time of day in ns since the epoch."""

    __slots__ = ("now", "wall")

    def __init__(self, wall: Callable[[], int]) -> None:
        self.now: Callable[[], int] = _no_clock
        """System time in ns; also the guest's TSC. Set once, before the domain starts."""
        self.wall: Final = wall

    def time_info(self, version: int) -> vcpu_time_info:
        """The pvclock parameters as of now; `version` is even."""
        now = self.now()
        return vcpu_time_info(
            version & 0xFFFFFFFF,
            0,
            now,
            now,
            TSC_TO_SYSTEM_MUL,
            TSC_SHIFT,
            XEN_PVCLOCK_TSC_STABLE_BIT,
            bytes(2),
        )

    def update_time_info(self, cpu: Cpu, state: VcpuState) -> None:
        """Refresh the pvclock of a vCPU in its vcpu_info and, if it is the current one, in its registered copy."""
        offset = state.info + TIME_OFFSET
        octets = cpu.octets
        version = _VERSION.unpack_from(octets, offset)[0]
        # The vCPU does not run meanwhile, but user space of another might read its page later: keep the protocol.
        _VERSION.pack_into(octets, offset, (version | 1) & 0xFFFFFFFF)
        info = self.time_info((version | 1) + 1)
        packed = VCPU_TIME_INFO.pack(info)
        octets[offset + 4 : offset + len(packed)] = packed[4:]
        octets[offset : offset + 4] = packed[:4]
        if state.time_area and state is cpu.current:
            self.write_time_area(cpu, state)

    def write_time_area(self, cpu: Cpu, state: VcpuState) -> None:
        """Copy the pvclock to the registered area. A fault leaves it as it was, as on Xen."""
        offset = state.info + TIME_OFFSET
        try:
            cpu.mmu.write_virtual(state.time_area, bytes(cpu.octets[offset : offset + VCPU_TIME_INFO.size]))
        except GuestFault:
            return

    def update_wall_clock(self, octets: memoryview, shared_info: int) -> None:
        """Write the time of day at system time 0 (wc_sec, wc_nsec, wc_sec_hi) into the shared info at byte `shared_info`."""
        offset = shared_info + WALL_CLOCK_OFFSET
        base = max(self.wall() - self.now(), 0)
        seconds, nanoseconds = divmod(base, _NS)
        version = _VERSION.unpack_from(octets, offset)[0]
        _VERSION.pack_into(octets, offset, (version | 1) & 0xFFFFFFFF)
        _WALL.pack_into(octets, offset + 4, seconds & 0xFFFFFFFF, nanoseconds, seconds >> 32 & 0xFFFFFFFF)
        _VERSION.pack_into(octets, offset, ((version | 1) + 1) & 0xFFFFFFFF)

    # --- run states

    def set_runstate(self, state: VcpuState, runstate: int) -> None:
        """Account the time since the last change to the old run state."""
        if state.runstate == runstate:
            return
        now = self.now()
        state.runstate_time[state.runstate] += max(now - state.runstate_entry, 0)
        state.runstate = runstate
        state.runstate_entry = now

    def runstate_info(self, state: VcpuState) -> vcpu_runstate_info:
        """VCPUOP_get_runstate_info: the time of the state that lasts is counted up to now."""
        now = self.now()
        times = list(state.runstate_time)
        times[state.runstate] += max(now - state.runstate_entry, 0)
        return vcpu_runstate_info(
            state.runstate, state.runstate_entry, (times[0], times[1], times[2], times[3])
        )

    def write_runstate_area(self, cpu: Cpu, state: VcpuState) -> None:
        """Update the guest's copy. XEN_RUNSTATE_UPDATE is clear in what is written: nobody of the domain runs during the
        update, so that the value with the flag set could never be seen."""
        info = vcpu_runstate_info(
            state.runstate,
            state.runstate_entry,
            (state.runstate_time[0], state.runstate_time[1], state.runstate_time[2], state.runstate_time[3]),
        )
        packed = VCPU_RUNSTATE_INFO.pack(info)
        if cpu.compat:
            packed = packed[:4] + packed[8:]  # 32-bit code aligns 64-bit words to 4 bytes
        try:
            cpu.mmu.write_virtual(state.runstate_area, packed)
        except GuestFault:
            return


def idle_runstate(state: VcpuState) -> int:
    """The run state of a vCPU that does not run."""
    if not state.online:
        return RUNSTATE_offline
    return RUNSTATE_blocked if state.blocked else RUNSTATE_runnable


def timer_due(state: VcpuState, now: int) -> bool:
    """Take expired timers off a vCPU; True if VIRQ_TIMER is to be sent. A late periodic timer does not make up for ticks."""
    due = False
    if state.singleshot is not None and now >= state.singleshot:
        state.singleshot = None
        due = True
    if state.periodic_period and state.timer_port and now >= state.periodic_next:
        due = due or state.periodic_next != 0
        state.periodic_next = now + state.periodic_period
    return due


CALIBRATION_NS: Final = 10_000_000
READINGS: Final = 16


def count_nanoseconds(vcpu: Vcpu, monotonic: Callable[[], int], start: int) -> None:
    """Have the guest's TSC count nanoseconds of the host's monotonic clock, from `start` on: it is Xen's system time then, and
    RDTSC needs no hook. Takes CALIBRATION_NS; the rate is exact to some ten parts in a million, which nobody can see: all
    times of the domain are read from this one counter."""
    first, first_tsc = _both(vcpu, monotonic)
    now = first
    while now - first < CALIBRATION_NS:
        now = monotonic()
    last, last_tsc = _both(vcpu, monotonic)
    multiplier = (last - first << 32) // max(last_tsc - first_tsc, 1)
    vcpu.set_tsc(offset=start - (last_tsc * multiplier >> 32), multiplier=multiplier)


def _both(vcpu: Vcpu, monotonic: Callable[[], int]) -> tuple[int, int]:
    """(monotonic ns, TSC) of one moment: the closest of some readings, since this thread may be taken off the CPU between two."""
    best: tuple[int, int, int] | None = None
    for _ in range(READINGS):
        before = monotonic()
        tsc = vcpu.host_tsc()
        after = monotonic()
        if best is None or after - before < best[0]:
            best = after - before, (before + after) // 2, tsc
    assert best is not None
    return best[1], best[2]
