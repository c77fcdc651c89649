"""HYPERVISOR_physdev_op: interrupts, I/O privilege, PCI devices (physdev.h)."""

from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Layout, Union, handle, i32, u8, u16, u32, u64

PHYSDEVOP_eoi: Final = 12
PHYSDEVOP_pirq_eoi_gmfn_v1: Final = 17
PHYSDEVOP_pirq_eoi_gmfn_v2: Final = 28
PHYSDEVOP_irq_status_query: Final = 5

XENIRQSTAT_needs_eoi: Final = 1
XENIRQSTAT_shared: Final = 2

PHYSDEVOP_set_iopl: Final = 6
PHYSDEVOP_set_iobitmap: Final = 7
PHYSDEVOP_apic_read: Final = 8
PHYSDEVOP_apic_write: Final = 9
PHYSDEVOP_alloc_irq_vector: Final = 10
PHYSDEVOP_free_irq_vector: Final = 11

MAP_PIRQ_TYPE_MSI: Final = 0x0
MAP_PIRQ_TYPE_GSI: Final = 0x1
MAP_PIRQ_TYPE_UNKNOWN: Final = 0x2
MAP_PIRQ_TYPE_MSI_SEG: Final = 0x3
MAP_PIRQ_TYPE_MULTI_MSI: Final = 0x4

PHYSDEVOP_map_pirq: Final = 13
PHYSDEVOP_unmap_pirq: Final = 14
PHYSDEVOP_manage_pci_add: Final = 15
PHYSDEVOP_manage_pci_remove: Final = 16
PHYSDEVOP_restore_msi: Final = 19
PHYSDEVOP_manage_pci_add_ext: Final = 20
PHYSDEVOP_setup_gsi: Final = 21
PHYSDEVOP_get_free_pirq: Final = 23

XEN_PCI_MMCFG_RESERVED: Final = 0x1

PHYSDEVOP_pci_mmcfg_reserved: Final = 24

XEN_PCI_DEV_EXTFN: Final = 0x1
XEN_PCI_DEV_VIRTFN: Final = 0x2
XEN_PCI_DEV_PXM: Final = 0x4

PHYSDEVOP_pci_device_add: Final = 25
PHYSDEVOP_pci_device_remove: Final = 26
PHYSDEVOP_restore_msi_ext: Final = 27
PHYSDEVOP_prepare_msix: Final = 30
PHYSDEVOP_release_msix: Final = 31
PHYSDEVOP_DBGP_RESET_PREPARE: Final = 1
PHYSDEVOP_DBGP_RESET_DONE: Final = 2
PHYSDEVOP_DBGP_BUS_UNKNOWN: Final = 0
PHYSDEVOP_DBGP_BUS_PCI: Final = 1
PHYSDEVOP_dbgp_op: Final = 29
PHYSDEVOP_IRQ_UNMASK_NOTIFY: Final = 4
PHYSDEVOP_pirq_eoi_gmfn: Final = PHYSDEVOP_pirq_eoi_gmfn_v2


class physdev_eoi(NamedTuple):
    irq: u32


PHYSDEV_EOI: Final = Layout(physdev_eoi)


class physdev_pirq_eoi_gmfn(NamedTuple):
    gmfn: u64


PHYSDEV_PIRQ_EOI_GMFN: Final = Layout(physdev_pirq_eoi_gmfn)


class physdev_irq_status_query(NamedTuple):
    irq: u32
    flags: u32


PHYSDEV_IRQ_STATUS_QUERY: Final = Layout(physdev_irq_status_query)


class physdev_set_iopl(NamedTuple):
    iopl: u32


PHYSDEV_SET_IOPL: Final = Layout(physdev_set_iopl)


class physdev_set_iobitmap(NamedTuple):
    bitmap: handle
    nr_ports: u32


PHYSDEV_SET_IOBITMAP: Final = Layout(physdev_set_iobitmap)


class physdev_apic(NamedTuple):
    apic_physbase: u64
    reg: u32
    value: u32


PHYSDEV_APIC: Final = Layout(physdev_apic)


class physdev_irq(NamedTuple):
    irq: u32
    vector: u32


PHYSDEV_IRQ: Final = Layout(physdev_irq)


class physdev_map_pirq(NamedTuple):
    domid: u16
    type: i32
    index_: i32
    pirq: i32
    bus: i32
    devfn: i32
    entry_nr: i32
    table_base: u64


PHYSDEV_MAP_PIRQ: Final = Layout(physdev_map_pirq, c_fields={"index_": "index"})


class physdev_unmap_pirq(NamedTuple):
    domid: u16
    pirq: i32


PHYSDEV_UNMAP_PIRQ: Final = Layout(physdev_unmap_pirq)


class physdev_manage_pci(NamedTuple):
    bus: u8
    devfn: u8


PHYSDEV_MANAGE_PCI: Final = Layout(physdev_manage_pci)


class physdev_restore_msi(NamedTuple):
    bus: u8
    devfn: u8


PHYSDEV_RESTORE_MSI: Final = Layout(physdev_restore_msi)


class physdev_manage_pci_ext_physfn(NamedTuple):
    bus: u8
    devfn: u8


PHYSDEV_MANAGE_PCI_EXT_PHYSFN: Final = Layout(
    physdev_manage_pci_ext_physfn, c="__typeof__(((struct physdev_manage_pci_ext *)0)->physfn)"
)


class physdev_manage_pci_ext(NamedTuple):
    bus: u8
    devfn: u8
    is_extfn: u32
    is_virtfn: u32
    physfn: physdev_manage_pci_ext_physfn


PHYSDEV_MANAGE_PCI_EXT: Final = Layout(physdev_manage_pci_ext)


class physdev_op(NamedTuple):
    cmd: u32
    u: Annotated[
        bytes,
        Union(
            irq_status_query=physdev_irq_status_query,
            set_iopl=physdev_set_iopl,
            set_iobitmap=physdev_set_iobitmap,
            apic_op=physdev_apic,
            irq_op=physdev_irq,
        ),
    ]


PHYSDEV_OP: Final = Layout(physdev_op)


class physdev_setup_gsi(NamedTuple):
    gsi: i32
    triggering: u8
    polarity: u8


PHYSDEV_SETUP_GSI: Final = Layout(physdev_setup_gsi)


class physdev_get_free_pirq(NamedTuple):
    type: i32
    pirq: u32


PHYSDEV_GET_FREE_PIRQ: Final = Layout(physdev_get_free_pirq)


class physdev_pci_mmcfg_reserved(NamedTuple):
    address: u64
    segment: u16
    start_bus: u8
    end_bus: u8
    flags: u32


PHYSDEV_PCI_MMCFG_RESERVED: Final = Layout(physdev_pci_mmcfg_reserved)


class physdev_pci_device_add_physfn(NamedTuple):
    bus: u8
    devfn: u8


PHYSDEV_PCI_DEVICE_ADD_PHYSFN: Final = Layout(
    physdev_pci_device_add_physfn, c="__typeof__(((struct physdev_pci_device_add *)0)->physfn)"
)


class physdev_pci_device_add(NamedTuple):
    seg: u16
    bus: u8
    devfn: u8
    flags: u32
    physfn: physdev_pci_device_add_physfn


PHYSDEV_PCI_DEVICE_ADD: Final = Layout(physdev_pci_device_add)


class physdev_pci_device(NamedTuple):
    seg: u16
    bus: u8
    devfn: u8


PHYSDEV_PCI_DEVICE: Final = Layout(physdev_pci_device)


class physdev_dbgp_op(NamedTuple):
    op: u8
    bus: u8
    u: Annotated[bytes, Union(pci=physdev_pci_device)]


PHYSDEV_DBGP_OP: Final = Layout(physdev_dbgp_op)
