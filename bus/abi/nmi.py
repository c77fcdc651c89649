"""HYPERVISOR_nmi_op (nmi.h)."""

from typing import Final, NamedTuple

from bus.abi.layout import Layout, u64

XEN_NMIREASON_io_error: Final = 1
XEN_NMIREASON_pci_serr: Final = 2
XEN_NMIREASON_unknown: Final = 4

XENNMI_register_callback: Final = 0
XENNMI_unregister_callback: Final = 1


class xennmi_callback(NamedTuple):
    handler_address: u64
    pad: u64


XENNMI_CALLBACK: Final = Layout(xennmi_callback)
