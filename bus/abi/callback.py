"""HYPERVISOR_callback_op: entry points of a PV guest (callback.h)."""

from typing import Final, NamedTuple

from bus.abi.layout import Layout, u16, u64

CALLBACKTYPE_event: Final = 0
CALLBACKTYPE_failsafe: Final = 1
CALLBACKTYPE_syscall: Final = 2
CALLBACKTYPE_sysenter_deprecated: Final = 3
CALLBACKTYPE_nmi: Final = 4
CALLBACKTYPE_sysenter: Final = 5
CALLBACKTYPE_syscall32: Final = 7

CALLBACKF_mask_events: Final = 1

CALLBACKOP_register: Final = 0
CALLBACKOP_unregister: Final = 1


class callback_register(NamedTuple):
    """type: CALLBACKTYPE_*; flags: CALLBACKF_*."""

    type: u16
    flags: u16
    address: u64


CALLBACK_REGISTER: Final = Layout(callback_register)


class callback_unregister(NamedTuple):
    type: u16
    unused: u16


CALLBACK_UNREGISTER: Final = Layout(callback_unregister, c_fields={"unused": "_unused"})
