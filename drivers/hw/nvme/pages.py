"""Identify and log pages of the controller (NVMe 1.4, sections 5.14.1 and 5.15.2)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from drivers.hw.nvme import spec

FIRMWARE: Final = b"1.0     "
VENDOR: Final = 0x1AF4
"""Red Hat / Qumranet, whose range holds emulated devices."""
DEVICE: Final = 0x0110
ERROR_LOG_ENTRIES: Final = 64
ABORT_LIMIT: Final = 4
ASYNC_LIMIT: Final = 4
TEMPERATURE_K: Final = 303
"""The composite temperature: constant, there is nothing to measure."""
WARNING_K: Final = 343
CRITICAL_K: Final = 353


@dataclass(frozen=True, slots=True)
class Namespace:
    """What the controller knows of a namespace. Sizes in logical blocks of 2**shift bytes."""

    nsid: int
    blocks: int
    shift: int = 9
    read_only: bool = False


@dataclass(slots=True)
class Counters:
    """What SMART reports."""

    sectors_read: int = 0
    sectors_written: int = 0
    reads: int = 0
    writes: int = 0
    media_errors: int = 0
    errors: int = 0
    power_cycles: int = 1
    unsafe_shutdowns: int = 0
    started_ns: int = 0


@dataclass(slots=True)
class Identity:
    """What makes one controller differ from another."""

    serial: str
    model: str = "Domicile NVMe controller"
    mdts: int = 6
    """log2 of the largest transfer in pages of 4 KiB."""
    queues: int = 16
    """I/O queue pairs."""
    vectors: int = 17
    max_queue: int = 1024
    namespaces: dict[int, Namespace] = field(default_factory=dict)


def _text(value: str, size: int) -> bytes:
    return value.encode("ascii", "replace")[:size].ljust(size)


def controller(identity: Identity) -> bytes:
    """CNS 01h."""
    zero = spec.IDENTIFY_CONTROLLER.zero()
    capacity = sum(space.blocks << space.shift for space in identity.namespaces.values())
    page = zero._replace(
        vid=VENDOR,
        ssvid=VENDOR,
        sn=_text(identity.serial, 20),
        mn=_text(identity.model, 40),
        fr=FIRMWARE,
        rab=6,
        ieee=bytes((0x00, 0x54, 0x52)),
        mdts=identity.mdts,
        cntlid=1,
        ver=spec.VERSION_1_4,
        cntrltype=1,
        acl=ABORT_LIMIT - 1,
        aerl=ASYNC_LIMIT - 1,
        frmw=1 << 1 | 1,  # one slot, read-only
        lpa=1 << 2,  # offsets in GET LOG PAGE
        elpe=ERROR_LOG_ENTRIES - 1,
        wctemp=WARNING_K,
        cctemp=CRITICAL_K,
        tnvmcap=capacity.to_bytes(16, "little"),
        sqes=spec.SQE_SHIFT << 4 | spec.SQE_SHIFT,
        cqes=spec.CQE_SHIFT << 4 | spec.CQE_SHIFT,
        nn=max(identity.namespaces, default=1),
        oncs=spec.ONCS_COMPARE | spec.ONCS_DSM | spec.ONCS_WRITE_ZEROES,
        sgls=spec.SGLS_ANY,
        vwc=spec.VWC_PRESENT | 3 << 1,  # FLUSH of all namespaces at once is supported
        subnqn=f"nqn.2014-08.org.nvmexpress:uuid:{_uuid(identity.serial)}".encode().ljust(256, b"\0"),
        psd0=zero.psd0._replace(max_power=2500),
    )
    return spec.IDENTIFY_CONTROLLER.pack(page)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _uuid(text: str) -> str:
    raw = _digest(text).hex()
    return f"{raw[:8]}-{raw[8:12]}-4{raw[13:16]}-8{raw[17:20]}-{raw[20:32]}"


def nguid(identity: Identity, nsid: int) -> bytes:
    """A namespace's globally unique identifier: derived from the serial number."""
    return _digest(f"{identity.serial}/{nsid}")[:16]


def namespace(identity: Identity, space: Namespace, used_blocks: int) -> bytes:
    """CNS 00h. `used_blocks`: blocks that take space."""
    zero = spec.IDENTIFY_NAMESPACE.zero()
    page = zero._replace(
        nsze=space.blocks,
        ncap=space.blocks,
        nuse=min(space.blocks, used_blocks),
        nsfeat=0,
        dlfeat=1 | 1 << 3,  # deallocated blocks read as zeroes; write zeroes may deallocate
        nsattr=1 if space.read_only else 0,
        nvmcap=(space.blocks << space.shift).to_bytes(16, "little"),
        nguid=nguid(identity, space.nsid),
        lbaf=(space.shift << 16, *[0] * 15),
    )
    return spec.IDENTIFY_NAMESPACE.pack(page)


def active_list(identity: Identity, after: int) -> bytes:
    """CNS 02h: up to 1024 namespace ids above `after`, in order."""
    ids = sorted(nsid for nsid in identity.namespaces if nsid > after)[:1024]
    return b"".join(nsid.to_bytes(4, "little") for nsid in ids).ljust(spec.IDENTIFY_SIZE, b"\0")


def descriptors(identity: Identity, nsid: int) -> bytes:
    """CNS 03h: the NGUID (type 2)."""
    return (bytes((2, 16, 0, 0)) + nguid(identity, nsid)).ljust(spec.IDENTIFY_SIZE, b"\0")


def smart(counters: Counters, now: int, over_threshold: bool) -> bytes:
    """Log page 02h."""

    def wide(value: int) -> bytes:
        return value.to_bytes(16, "little")

    page = spec.SMART_LOG.zero()._replace(
        critical_warning=1 << 1 if over_threshold else 0,
        temperature=TEMPERATURE_K,
        spare=100,
        spare_threshold=10,
        data_read=wide(-(-counters.sectors_read // 1000)),
        data_written=wide(-(-counters.sectors_written // 1000)),
        read_commands=wide(counters.reads),
        write_commands=wide(counters.writes),
        power_cycles=wide(counters.power_cycles),
        power_on_hours=wide(max(0, now - counters.started_ns) // 3_600_000_000_000),
        unsafe_shutdowns=wide(counters.unsafe_shutdowns),
        media_errors=wide(counters.media_errors),
        error_entries=wide(counters.errors),
    )
    return spec.SMART_LOG.pack(page)


def firmware() -> bytes:
    """Log page 03h."""
    return spec.FIRMWARE_LOG.pack(spec.FIRMWARE_LOG.zero()._replace(afi=1, slot1=FIRMWARE))
