"""The link between the command (or a test) and Dom0's toolstack: requests, responses, notices.

One SOCK_SEQPACKET connection a client, on a socket that only the machine's owner can reach; files travel as descriptors.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from bus.messages.domain import U32
from bus.messages.envelope import MAX_DATA, MAX_ITEMS, Message, registry

Action = Literal[
    "destroy", "restart", "rename-restart", "preserve", "coredump-destroy", "coredump-restart", "soft-reset"
]
Cpus = Annotated[list[Annotated[int, Field(ge=0, le=1023)]], Field(min_length=1, max_length=1024)]
Text = Annotated[str, Field(max_length=4096)]


class DomainConfig(Message):
    """What a domain is to be: the fields of an xl.cfg that a machine needs. Files are descriptors sent along, by index."""

    KIND: ClassVar[str] = "domain_config"
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.+-]+$")]
    type: Literal["pv", "pvh", "hvm"] = "pv"
    memory_mb: Annotated[int, Field(ge=1, le=1 << 20)] = 128
    maxmem_mb: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    """0: as `memory_mb`."""
    vcpus: Annotated[int, Field(ge=1, le=128)] = 1
    maxvcpus: Annotated[int, Field(ge=0, le=128)] = 0
    uuid: Annotated[bytes, Field(min_length=16, max_length=16)]
    kernel: Annotated[int, Field(ge=-1, le=63)] = -1
    kernel_path: Text = ""
    ramdisk: Annotated[int, Field(ge=-1, le=63)] = -1
    ramdisk_path: Text = ""
    cmdline: Text = ""
    shim: Annotated[int, Field(ge=-1, le=63)] = -1
    """Of a PVH guest: Xen's shim, which starts, and runs `kernel`, a PV kernel that it gets as a module."""
    shim_path: Text = ""
    shim_cmdline: Text = ""
    firmware: Annotated[int, Field(ge=-1, le=63)] = -1
    """Of an HVM guest: SeaBIOS."""
    firmware_path: Text = ""
    bios: Annotated[int, Field(ge=-1, le=63)] = -1
    """Of an HVM guest whose firmware is an ELF program (hvmloader): the BIOS that it is given."""
    video_bios: Annotated[int, Field(ge=-1, le=63)] = -1
    boot: Annotated[str, Field(max_length=4, pattern=r"^[acdn]*$")] = "cd"
    """Of an HVM guest: c disk, d optical drive, in the order in which they are tried."""
    serial: bool = True
    """Of an HVM guest: it has a serial line."""
    vga: Literal["stdvga", "none"] = "stdvga"
    hap: bool = True
    """Of HVM and PVH guests: two-level paging; False: shadow page tables."""
    time_offset: Annotated[int, Field(ge=-(1 << 40), le=1 << 40)] = 0
    """Seconds by which the guest's time of day differs from the host's."""
    vnc: bool = False
    """Of an HVM guest: its device model is a VNC server."""
    vnc_listen: Annotated[str, Field(max_length=64, pattern=r"^[0-9a-fA-F.:]+$")] = "127.0.0.1"
    vnc_display: Annotated[int, Field(ge=0, le=59635)] = 0
    vnc_unused: bool = True
    """The first free display from `vnc_display` on."""
    vnc_password: Annotated[str, Field(max_length=8)] = ""
    cpu_weight: Annotated[int, Field(ge=1, le=65535)] = 256
    cap: Annotated[int, Field(ge=0, le=65535)] = 0
    cpus: Annotated[list[Cpus | None], Field(max_length=128)] = []
    """Of each vCPU, from 0 on, the physical CPUs that it may use; None, or none said: all."""
    on_poweroff: Action = "destroy"
    on_reboot: Action = "restart"
    on_crash: Action = "destroy"
    on_watchdog: Action = "destroy"
    on_soft_reset: Action = "soft-reset"
    paused: bool = False
    pci: Annotated[list[Annotated[int, Field(ge=0, le=0xFFFF)]], Field(max_length=16)] = []
    """Devices of its own: bus << 8 | device << 3 | function."""
    disks: Annotated[list[dict[str, Any]], Field(max_length=64)] = []
    vifs: Annotated[list[dict[str, Any]], Field(max_length=16)] = []


class Request(Message):
    """Do something: `verb` with its arguments."""

    KIND: ClassVar[str] = "request"
    id: U32
    verb: Annotated[str, Field(max_length=40)]
    args: Annotated[dict[str, Any], Field(max_length=64)] = {}


class Response(Message):
    """The outcome of the request with that id: a result, or an error in one line that names the thing and the mend."""

    KIND: ClassVar[str] = "response"
    id: U32
    ok: bool
    result: Any = None
    error: Text = ""


class Notice(Message):
    """Something happened: console output of an attached console, the end of a domain."""

    KIND: ClassVar[str] = "notice"
    what: Annotated[str, Field(max_length=40)]
    body: Annotated[dict[str, Any], Field(max_length=MAX_ITEMS)] = {}


MAX_CONSOLE_CHUNK = MAX_DATA // 2
"""Bytes of console output in one notice."""
TO_TOOLSTACK = registry(Request)
FROM_TOOLSTACK = registry(Response, Notice)
