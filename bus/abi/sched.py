"""HYPERVISOR_sched_op: yield, block, poll, shutdown, watchdog (sched.h)."""

from typing import Final, NamedTuple

from bus.abi.layout import Layout, handle, i32, u16, u32, u64

SCHEDOP_yield: Final = 0
SCHEDOP_block: Final = 1
SCHEDOP_shutdown: Final = 2
SCHEDOP_poll: Final = 3
SCHEDOP_remote_shutdown: Final = 4
SCHEDOP_shutdown_code: Final = 5
SCHEDOP_watchdog: Final = 6
SCHEDOP_pin_override: Final = 7

SHUTDOWN_poweroff: Final = 0
SHUTDOWN_reboot: Final = 1
SHUTDOWN_suspend: Final = 2
SHUTDOWN_crash: Final = 3
SHUTDOWN_watchdog: Final = 4
SHUTDOWN_soft_reset: Final = 5
SHUTDOWN_MAX: Final = 5


class sched_shutdown(NamedTuple):
    """reason: SHUTDOWN_*."""

    reason: u32


SCHED_SHUTDOWN: Final = Layout(sched_shutdown)


class sched_poll(NamedTuple):
    """ports: nr_ports event channel ports of 32 bits. timeout: absolute system time in ns, 0 for none."""

    ports: handle
    nr_ports: u32
    timeout: u64


SCHED_POLL: Final = Layout(sched_poll)


class sched_remote_shutdown(NamedTuple):
    domain_id: u16
    reason: u32


SCHED_REMOTE_SHUTDOWN: Final = Layout(sched_remote_shutdown)


class sched_watchdog(NamedTuple):
    """timeout in seconds."""

    id: u32
    timeout: u32


SCHED_WATCHDOG: Final = Layout(sched_watchdog)


class sched_pin_override(NamedTuple):
    pcpu: i32


SCHED_PIN_OVERRIDE: Final = Layout(sched_pin_override)
