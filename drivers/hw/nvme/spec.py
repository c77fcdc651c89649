"""What an NVMe controller and its driver agree on: registers, commands, completions, status codes, identify and log pages.

Source: NVM Express Base Specification, revision 1.4 (section numbers beside each part). All values are little endian.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Array, Bytes, Layout, u8, u16, u32, u64

# -- PCI ------------------------------------------------------------------------------------------------------------

PCI_CLASS: Final = 0x010802
"""Mass storage, non-volatile memory, NVM Express (section 2.1.5): base class, sub-class, programming interface."""
BAR: Final = 0
"""The registers' 64-bit memory BAR (BAR 0 and 1)."""
BAR_SIZE: Final = 0x4000
DOORBELL_OFFSET: Final = 0x1000
"""Doorbells in the BAR (stride 0): one page, 512 queue pairs at the most; offered as doorbell page."""
DOORBELL_LENGTH: Final = 0x1000
MSIX_TABLE_OFFSET: Final = 0x2000
MSIX_PBA_OFFSET: Final = 0x3000

# -- registers (section 3.1) ----------------------------------------------------------------------------------------

REG_CAP: Final = 0x00
"""64 bits: controller capabilities."""
REG_VS: Final = 0x08
REG_INTMS: Final = 0x0C
REG_INTMC: Final = 0x10
REG_CC: Final = 0x14
REG_CSTS: Final = 0x1C
REG_NSSR: Final = 0x20
REG_AQA: Final = 0x24
REG_ASQ: Final = 0x28
"""64 bits: page-aligned address of the admin submission queue."""
REG_ACQ: Final = 0x30
"""64 bits: page-aligned address of the admin completion queue."""
REG_CMBLOC: Final = 0x38
REG_CMBSZ: Final = 0x3C

VERSION_1_4: Final = 0x00010400

CAP_MQES_MASK: Final = 0xFFFF
"""Largest queue, minus one."""
CAP_CQR: Final = 1 << 16
"""Queues must be physically contiguous."""
CAP_TO_SHIFT: Final = 24
"""Longest wait for CSTS.RDY to follow CC.EN, in 500 ms (8 bits)."""
CAP_DSTRD_SHIFT: Final = 32
CAP_CSS_NVM: Final = 1 << 37
CAP_MPSMIN_SHIFT: Final = 48
CAP_MPSMAX_SHIFT: Final = 52

CC_EN: Final = 1
CC_CSS_SHIFT: Final = 4
CC_MPS_SHIFT: Final = 7
CC_AMS_SHIFT: Final = 11
CC_SHN_SHIFT: Final = 14
CC_SHN_MASK: Final = 3 << 14
CC_IOSQES_SHIFT: Final = 16
CC_IOCQES_SHIFT: Final = 20
SHN_NONE, SHN_NORMAL, SHN_ABRUPT = 0, 1, 2

CSTS_RDY: Final = 1
CSTS_CFS: Final = 1 << 1
"""Controller fatal status: only a reset helps."""
CSTS_SHST_SHIFT: Final = 2
CSTS_SHST_MASK: Final = 3 << 2
SHST_NORMAL, SHST_OCCURRING, SHST_COMPLETE = 0, 1, 2

SQE_SHIFT: Final = 6
"""CC.IOSQES: submission entries are 64 bytes."""
CQE_SHIFT: Final = 4
"""CC.IOCQES: completion entries are 16 bytes."""


def sq_doorbell(qid: int) -> int:
    """Byte offset in the BAR of a submission queue's tail doorbell (section 3.1.24, stride 0). 32 bits wide."""
    return DOORBELL_OFFSET + 8 * qid


def cq_doorbell(qid: int) -> int:
    """Byte offset in the BAR of a completion queue's head doorbell (section 3.1.25, stride 0). 32 bits wide."""
    return DOORBELL_OFFSET + 8 * qid + 4


# -- commands and completions (sections 4.2 and 4.6) ----------------------------------------------------------------


class Command(NamedTuple):
    """A submission queue entry, 64 bytes."""

    opcode: u8
    flags: u8
    """FUSE in bits 1:0, PSDT (0: PRPs) in bits 7:6."""
    cid: u16
    nsid: u32
    cdw2: u32
    cdw3: u32
    mptr: u64
    prp1: u64
    prp2: u64
    cdw10: u32
    cdw11: u32
    cdw12: u32
    cdw13: u32
    cdw14: u32
    cdw15: u32


class Completion(NamedTuple):
    """A completion queue entry, 16 bytes."""

    dw0: u32
    """Command specific result."""
    dw1: u32
    sqhd: u16
    """Submission queue head: entries before it may be used again."""
    sqid: u16
    cid: u16
    status: u16
    """Phase in bit 0; SC in 8:1, SCT in 11:9, CRD in 13:12, M (more) in 14, DNR (do not retry) in 15."""


COMMAND: Final = Layout(Command)
COMPLETION: Final = Layout(Completion)
SQE_SIZE: Final = 64
CQE_SIZE: Final = 16

FLAG_FUSE_MASK: Final = 0x3
FLAG_PSDT_MASK: Final = 0xC0
FLAG_SGL: Final = 0x40
"""PSDT: the data pointer is an SGL descriptor; MPTR, if it were used, an address."""
SGLS_ANY: Final = 0x1
"""SGLS of IDENTIFY: SGLs are supported, data blocks need no alignment (2: they need that of a dword)."""
STATUS_PHASE: Final = 1
STATUS_MORE: Final = 1 << 14
STATUS_DNR: Final = 1 << 15
NSID_ALL: Final = 0xFFFF_FFFF


def status_of(field: int) -> int:
    """SCT << 8 | SC of a completion's 16-bit status field: comparable with `Status`."""
    return field >> 1 & 0x7FF


class AdminOpcode(IntEnum):
    """Section 5."""

    DELETE_SQ = 0x00
    CREATE_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_CQ = 0x04
    CREATE_CQ = 0x05
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT = 0x0C
    NAMESPACE_MANAGEMENT = 0x0D
    FIRMWARE_COMMIT = 0x10
    FIRMWARE_DOWNLOAD = 0x11
    SELF_TEST = 0x14
    NAMESPACE_ATTACH = 0x15
    KEEP_ALIVE = 0x18
    DOORBELL_BUFFER = 0x7C
    FORMAT_NVM = 0x80
    SECURITY_SEND = 0x81
    SECURITY_RECEIVE = 0x82
    SANITIZE = 0x84


class IoOpcode(IntEnum):
    """Section 6: the NVM command set."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    WRITE_UNCORRECTABLE = 0x04
    COMPARE = 0x05
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09
    VERIFY = 0x0C


class Status(IntEnum):
    """SCT << 8 | SC (section 4.6.1)."""

    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    CID_CONFLICT = 0x003
    DATA_TRANSFER_ERROR = 0x004
    POWER_LOSS = 0x005
    INTERNAL_ERROR = 0x006
    ABORT_REQUESTED = 0x007
    SQ_DELETED = 0x008
    INVALID_NAMESPACE = 0x00B
    COMMAND_SEQUENCE = 0x00C
    SGL_SEGMENT = 0x00D
    """A segment's descriptor is invalid."""
    SGL_COUNT = 0x00E
    """A segment's descriptor where none may be, or too many descriptors."""
    SGL_DATA_LENGTH = 0x00F
    SGL_TYPE = 0x011
    INVALID_PRP_OFFSET = 0x013
    NAMESPACE_WRITE_PROTECTED = 0x020
    LBA_OUT_OF_RANGE = 0x080
    CAPACITY_EXCEEDED = 0x081
    NAMESPACE_NOT_READY = 0x082
    # command specific
    CQ_INVALID = 0x100
    INVALID_QID = 0x101
    INVALID_QUEUE_SIZE = 0x102
    ABORT_LIMIT = 0x103
    ASYNC_EVENT_LIMIT = 0x105
    INVALID_FIRMWARE_SLOT = 0x106
    INVALID_VECTOR = 0x108
    INVALID_LOG_PAGE = 0x109
    INVALID_FORMAT = 0x10A
    INVALID_QUEUE_DELETION = 0x10C
    FEATURE_NOT_SAVEABLE = 0x10D
    FEATURE_NOT_CHANGEABLE = 0x10E
    FEATURE_NOT_NAMESPACE = 0x10F
    READ_ONLY_RANGE = 0x182
    # media and data integrity
    WRITE_FAULT = 0x280
    UNRECOVERED_READ = 0x281
    COMPARE_FAILURE = 0x285


class Feature(IntEnum):
    """Feature identifiers (section 5.21.1)."""

    ARBITRATION = 0x01
    POWER_MANAGEMENT = 0x02
    TEMPERATURE_THRESHOLD = 0x04
    ERROR_RECOVERY = 0x05
    VOLATILE_WRITE_CACHE = 0x06
    NUMBER_OF_QUEUES = 0x07
    INTERRUPT_COALESCING = 0x08
    INTERRUPT_VECTOR = 0x09
    WRITE_ATOMICITY = 0x0A
    ASYNC_EVENT = 0x0B


class LogPage(IntEnum):
    """Log page identifiers (section 5.14.1)."""

    ERROR = 0x01
    SMART = 0x02
    FIRMWARE_SLOT = 0x03


class Cns(IntEnum):
    """What IDENTIFY returns (section 5.15.1)."""

    NAMESPACE = 0x00
    CONTROLLER = 0x01
    ACTIVE_NAMESPACES = 0x02
    NAMESPACE_DESCRIPTORS = 0x03


# -- bits of commands -----------------------------------------------------------------------------------------------

QUEUE_PC: Final = 1
"""CREATE_*_Q, CDW11: physically contiguous (CDW10: QID in 15:0, size minus one in 31:16; CDW11 of SQ: CQID in 31:16)."""
CQ_IEN: Final = 2
"""CREATE_CQ, CDW11: interrupts enabled; vector in 31:16."""
IO_FUA: Final = 1 << 30
"""CDW12 of read, write, write zeroes: force unit access. NLB (blocks minus one) in 15:0; CDW10/11: starting LBA."""
IO_DEAC: Final = 1 << 25
"""CDW12 of write zeroes: deallocate."""
DSM_DEALLOCATE: Final = 1 << 2
"""CDW11 of dataset management: attribute deallocate; CDW10: number of ranges minus one in 7:0."""
DSM_MAX_RANGES: Final = 256

VWC_PRESENT: Final = 1
ONCS_COMPARE: Final = 1 << 0
ONCS_DSM: Final = 1 << 2
ONCS_WRITE_ZEROES: Final = 1 << 3


class DsmRange(NamedTuple):
    """A range of dataset management, 16 bytes (section 6.7)."""

    attributes: u32
    blocks: u32
    lba: u64


DSM_RANGE: Final = Layout(DsmRange)


# -- identify (section 5.15.2) --------------------------------------------------------------------------------------


class PowerState(NamedTuple):
    """Power state descriptor, 32 bytes."""

    max_power: u16
    reserved_2: u8
    flags: u8
    entry_latency: u32
    exit_latency: u32
    read_throughput: u8
    read_latency: u8
    write_throughput: u8
    write_latency: u8
    rest: Annotated[bytes, Bytes(16)]


class IdentifyController(NamedTuple):
    """CNS 01h, 4096 bytes."""

    vid: u16
    ssvid: u16
    sn: Annotated[bytes, Bytes(20)]
    mn: Annotated[bytes, Bytes(40)]
    fr: Annotated[bytes, Bytes(8)]
    rab: u8
    ieee: Annotated[bytes, Bytes(3)]
    cmic: u8
    mdts: u8
    """Largest transfer: CAP.MPSMIN pages, a power of two (0: no limit)."""
    cntlid: u16
    ver: u32
    rtd3r: u32
    rtd3e: u32
    oaes: u32
    ctratt: u32
    rrls: u16
    reserved_102: Annotated[bytes, Bytes(9)]
    cntrltype: u8
    fguid: Annotated[bytes, Bytes(16)]
    crdt: Annotated[tuple[int, ...], Array(u16, 3)]
    reserved_134: Annotated[bytes, Bytes(122)]
    oacs: u16
    acl: u8
    aerl: u8
    frmw: u8
    lpa: u8
    elpe: u8
    npss: u8
    avscc: u8
    apsta: u8
    wctemp: u16
    cctemp: u16
    mtfa: u16
    hmpre: u32
    hmmin: u32
    tnvmcap: Annotated[bytes, Bytes(16)]
    unvmcap: Annotated[bytes, Bytes(16)]
    rpmbs: u32
    edstt: u16
    dsto: u8
    fwug: u8
    kas: u16
    hctma: u16
    mntmt: u16
    mxtmt: u16
    sanicap: u32
    hmminds: u32
    hmmaxd: u16
    nsetidmax: u16
    endgidmax: u16
    anatt: u8
    anacap: u8
    anagrpmax: u32
    nanagrpid: u32
    pels: u32
    reserved_356: Annotated[bytes, Bytes(156)]
    sqes: u8
    cqes: u8
    maxcmd: u16
    nn: u32
    oncs: u16
    fuses: u16
    fna: u8
    vwc: u8
    awun: u16
    awupf: u16
    nvscc: u8
    nwpc: u8
    acwu: u16
    reserved_534: Annotated[bytes, Bytes(2)]
    sgls: u32
    mnan: u32
    reserved_544: Annotated[bytes, Bytes(224)]
    subnqn: Annotated[bytes, Bytes(256)]
    reserved_1024: Annotated[bytes, Bytes(1024)]
    psd0: PowerState
    rest: Annotated[bytes, Bytes(2016)]


IDENTIFY_CONTROLLER: Final = Layout(IdentifyController, packed=True)


class IdentifyNamespace(NamedTuple):
    """CNS 00h, 4096 bytes."""

    nsze: u64
    """Size in logical blocks."""
    ncap: u64
    nuse: u64
    nsfeat: u8
    nlbaf: u8
    flbas: u8
    """Format in use, index into `lbaf`, in bits 3:0."""
    mc: u8
    dpc: u8
    dps: u8
    nmic: u8
    rescap: u8
    fpi: u8
    dlfeat: u8
    nawun: u16
    nawupf: u16
    nacwu: u16
    nabsn: u16
    nabo: u16
    nabspf: u16
    noiob: u16
    nvmcap: Annotated[bytes, Bytes(16)]
    npwg: u16
    npwa: u16
    npdg: u16
    npda: u16
    nows: u16
    reserved_74: Annotated[bytes, Bytes(18)]
    anagrpid: u32
    reserved_96: Annotated[bytes, Bytes(3)]
    nsattr: u8
    """Bit 0: write protected."""
    nvmsetid: u16
    endgid: u16
    nguid: Annotated[bytes, Bytes(16)]
    eui64: Annotated[bytes, Bytes(8)]
    lbaf: Annotated[tuple[int, ...], Array(u32, 16)]
    """LBA formats: metadata size in 15:0, log2 of the block size in 23:16."""
    rest: Annotated[bytes, Bytes(3904)]


IDENTIFY_NAMESPACE: Final = Layout(IdentifyNamespace, packed=True)
IDENTIFY_SIZE: Final = 4096


def block_shift(identify: IdentifyNamespace) -> int:
    """log2 of the namespace's logical block size in bytes."""
    return identify.lbaf[identify.flbas & 0xF] >> 16 & 0xFF


# -- log pages (section 5.14.1) -------------------------------------------------------------------------------------


class ErrorEntry(NamedTuple):
    """Error information log entry, 64 bytes."""

    error_count: u64
    sqid: u16
    cid: u16
    status: u16
    location: u16
    lba: u64
    nsid: u32
    vendor: u8
    trtype: u8
    reserved_30: Annotated[bytes, Bytes(2)]
    specific: u64
    transport: u16
    reserved_42: Annotated[bytes, Bytes(22)]


class SmartLog(NamedTuple):
    """SMART / health information, 512 bytes. 128-bit counters as 16 bytes."""

    critical_warning: u8
    temperature: u16
    """Kelvin."""
    spare: u8
    spare_threshold: u8
    used: u8
    group_warning: u8
    reserved_7: Annotated[bytes, Bytes(25)]
    data_read: Annotated[bytes, Bytes(16)]
    """Thousands of 512-byte units, rounded up."""
    data_written: Annotated[bytes, Bytes(16)]
    read_commands: Annotated[bytes, Bytes(16)]
    write_commands: Annotated[bytes, Bytes(16)]
    busy_minutes: Annotated[bytes, Bytes(16)]
    power_cycles: Annotated[bytes, Bytes(16)]
    power_on_hours: Annotated[bytes, Bytes(16)]
    unsafe_shutdowns: Annotated[bytes, Bytes(16)]
    media_errors: Annotated[bytes, Bytes(16)]
    error_entries: Annotated[bytes, Bytes(16)]
    warning_minutes: u32
    critical_minutes: u32
    sensors: Annotated[bytes, Bytes(16)]
    rest: Annotated[bytes, Bytes(296)]


class FirmwareLog(NamedTuple):
    """Firmware slot information, 512 bytes."""

    afi: u8
    reserved_1: Annotated[bytes, Bytes(7)]
    slot1: Annotated[bytes, Bytes(8)]
    rest: Annotated[bytes, Bytes(496)]


ERROR_ENTRY: Final = Layout(ErrorEntry)
SMART_LOG: Final = Layout(SmartLog, packed=True)
FIRMWARE_LOG: Final = Layout(FirmwareLog, packed=True)

# -- asynchronous events (section 5.2.1): type in 2:0 of DW0, information in 15:8, log page in 23:16 -------------------

EVENT_ERROR: Final = 0
EVENT_SMART: Final = 1
EVENT_NOTICE: Final = 2
ERROR_BAD_DOORBELL_REGISTER: Final = 0
ERROR_BAD_DOORBELL_VALUE: Final = 1
SMART_TEMPERATURE: Final = 1

assert (COMMAND.size, COMPLETION.size, DSM_RANGE.size, ERROR_ENTRY.size) == (64, 16, 16, 64)
assert (IDENTIFY_CONTROLLER.size, IDENTIFY_NAMESPACE.size) == (IDENTIFY_SIZE, IDENTIFY_SIZE)
assert (SMART_LOG.size, FIRMWARE_LOG.size) == (512, 512)
assert IDENTIFY_CONTROLLER.offset("oacs") == 256
assert IDENTIFY_CONTROLLER.offset("sqes") == 512
assert IDENTIFY_CONTROLLER.offset("psd0") == 2048
assert IDENTIFY_NAMESPACE.offset("lbaf") == 128


MAY_RETRY: Final = frozenset(
    (
        Status.DATA_TRANSFER_ERROR,
        Status.INTERNAL_ERROR,
        Status.ABORT_REQUESTED,
        Status.SQ_DELETED,
        Status.WRITE_FAULT,
    )
)
"""A host that tries the command again may have success (DNR is 0)."""
