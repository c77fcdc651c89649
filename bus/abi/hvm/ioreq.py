"""I/O requests between Xen and a device model, in pages that both map (hvm/ioreq.h)."""

from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Array, Layout, u8, u16, u32, u64

IOREQ_READ: Final = 1
IOREQ_WRITE: Final = 0

STATE_IOREQ_NONE: Final = 0
STATE_IOREQ_READY: Final = 1
STATE_IOREQ_INPROCESS: Final = 2
STATE_IORESP_READY: Final = 3

IOREQ_TYPE_PIO: Final = 0
IOREQ_TYPE_COPY: Final = 1
IOREQ_TYPE_PCI_CONFIG: Final = 2
IOREQ_TYPE_TIMEOFFSET: Final = 7
IOREQ_TYPE_INVALIDATE: Final = 8
IOREQ_BUFFER_SLOT_NUM: Final = 511

ACPI_PM1A_EVT_BLK_ADDRESS_V0: Final = 0x1F40
ACPI_PM1A_CNT_BLK_ADDRESS_V0: Final = ACPI_PM1A_EVT_BLK_ADDRESS_V0 + 0x04
ACPI_PM_TMR_BLK_ADDRESS_V0: Final = ACPI_PM1A_EVT_BLK_ADDRESS_V0 + 0x08
ACPI_GPE0_BLK_ADDRESS_V0: Final = ACPI_PM_TMR_BLK_ADDRESS_V0 + 0x20
ACPI_GPE0_BLK_LEN_V0: Final = 0x08
ACPI_PM1A_EVT_BLK_ADDRESS_V1: Final = 0xB000
ACPI_PM1A_CNT_BLK_ADDRESS_V1: Final = ACPI_PM1A_EVT_BLK_ADDRESS_V1 + 0x04
ACPI_PM_TMR_BLK_ADDRESS_V1: Final = ACPI_PM1A_EVT_BLK_ADDRESS_V1 + 0x08
ACPI_GPE0_BLK_ADDRESS_V1: Final = 0xAFE0
ACPI_GPE0_BLK_LEN_V1: Final = 0x04
ACPI_PM1A_EVT_BLK_ADDRESS: Final = ACPI_PM1A_EVT_BLK_ADDRESS_V0
ACPI_PM1A_CNT_BLK_ADDRESS: Final = ACPI_PM1A_CNT_BLK_ADDRESS_V0
ACPI_PM_TMR_BLK_ADDRESS: Final = ACPI_PM_TMR_BLK_ADDRESS_V0
ACPI_GPE0_BLK_ADDRESS: Final = ACPI_GPE0_BLK_ADDRESS_V0
ACPI_GPE0_BLK_LEN: Final = ACPI_GPE0_BLK_LEN_V0


class ioreq(NamedTuple):
    """One I/O access of a vCPU. state: STATE_IOREQ_*; dir: IOREQ_READ is 1; type: IOREQ_TYPE_*;
    data_is_ptr: `data` is a guest-physical address, for `count` repeats."""

    addr: u64
    data: u64
    count_: u32
    size: u32
    vp_eport: u32
    pad0: u16
    # bit-fields from bit 0: state:4, data_is_ptr:1, dir:1, df:1, _pad1:1
    bits: u8
    type: u8


IOREQ: Final = Layout(ioreq, c_fields={"count_": "count", "pad0": "_pad0", "bits": ""})


class buf_ioreq(NamedTuple):
    # bit-fields from bit 0: type:8, pad:1, dir:1, size:2 (log2 of bytes), addr:20
    bits: u32
    data: u32


BUF_IOREQ: Final = Layout(buf_ioreq, c_fields={"bits": ""})


class buffered_iopage(NamedTuple):
    """Ring of buffered writes; the pointers run freely."""

    read_pointer: u32
    write_pointer: u32
    buf_ioreq: Annotated[tuple[buf_ioreq, ...], Array(buf_ioreq, 511)]


BUFFERED_IOPAGE: Final = Layout(buffered_iopage)
