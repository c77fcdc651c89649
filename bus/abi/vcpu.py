"""HYPERVISOR_vcpu_op: state, run-state accounting, timers, vCPU info placement (vcpu.h)."""

from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Array, Layout, i32, u32, u64

VCPUOP_initialise: Final = 0
VCPUOP_up: Final = 1
VCPUOP_down: Final = 2
VCPUOP_is_up: Final = 3
VCPUOP_get_runstate_info: Final = 4

XEN_RUNSTATE_UPDATE: Final = 0x8000000000000000

RUNSTATE_running: Final = 0
RUNSTATE_runnable: Final = 1
RUNSTATE_blocked: Final = 2
RUNSTATE_offline: Final = 3

VCPUOP_register_runstate_memory_area: Final = 5
VCPUOP_set_periodic_timer: Final = 6
VCPUOP_stop_periodic_timer: Final = 7
VCPUOP_set_singleshot_timer: Final = 8
VCPUOP_stop_singleshot_timer: Final = 9

VCPU_SSHOTTMR_future: Final = 1

VCPUOP_register_vcpu_info: Final = 10
VCPUOP_send_nmi: Final = 11
VCPUOP_get_physid: Final = 12
VCPUOP_register_vcpu_time_memory_area: Final = 13


class vcpu_runstate_info(NamedTuple):
    """state: RUNSTATE_*; times in ns of system time; state_entry_time has XEN_RUNSTATE_UPDATE set while it
    is written, if the assist is on."""

    state: i32
    state_entry_time: u64
    time: Annotated[tuple[int, ...], Array(u64, 4)]


VCPU_RUNSTATE_INFO: Final = Layout(vcpu_runstate_info)


class vcpu_register_runstate_memory_area(NamedTuple):
    addr: u64


VCPU_REGISTER_RUNSTATE_MEMORY_AREA: Final = Layout(vcpu_register_runstate_memory_area)


class vcpu_set_periodic_timer(NamedTuple):
    """ns."""

    period_ns: u64


VCPU_SET_PERIODIC_TIMER: Final = Layout(vcpu_set_periodic_timer)


class vcpu_set_singleshot_timer(NamedTuple):
    """timeout_abs_ns: system time. flags: VCPU_SSHOTTMR_future."""

    timeout_abs_ns: u64
    flags: u32


VCPU_SET_SINGLESHOT_TIMER: Final = Layout(vcpu_set_singleshot_timer)


class vcpu_register_vcpu_info(NamedTuple):
    """mfn: machine frame (gfn for auto-translated guests)."""

    mfn: u64
    offset: u32
    rsvd: u32


VCPU_REGISTER_VCPU_INFO: Final = Layout(vcpu_register_vcpu_info)


class vcpu_get_physid(NamedTuple):
    phys_id: u64


VCPU_GET_PHYSID: Final = Layout(vcpu_get_physid)


class vcpu_register_time_memory_area(NamedTuple):
    addr: u64


VCPU_REGISTER_TIME_MEMORY_AREA: Final = Layout(vcpu_register_time_memory_area)
