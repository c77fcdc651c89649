"""The devices of a device model, joined: all of a PC that is not hot enough to live beside the vCPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from bus.abi.sched import SHUTDOWN_reboot
from bus.process import Start
from domains.dm.guest import PAGE, Guest
from domains.dm.server import Spaces
from domains.dm.vnc import VncSettings
from drivers.hw.nvme.media import Media, RawMedia
from drivers.hw.nvme.media_qcow2 import Qcow2Media
from drivers.pc.acpi_pm import PmFunction
from drivers.pc.bus import Clock, Timed, earliest
from drivers.pc.fw_cfg import FwCfg
from drivers.pc.i440fx import I440fx
from drivers.pc.i8042 import AUX_IRQ, I8042, KEYBOARD_IRQ
from drivers.pc.ide import Drive
from drivers.pc.ide_cd import OpticalDrive
from drivers.pc.ide_disk import Disk
from drivers.pc.ide_pci import IdeFunction
from drivers.pc.keys import parse_combination
from drivers.pc.pci import PciBus
from drivers.pc.pci_setup import set_up_pci
from drivers.pc.piix3 import Piix3Isa
from drivers.pc.rfb import Event, KeyEvent
from drivers.pc.system import A20, ResetControl
from drivers.pc.uart import COM1, COM1_IRQ, Uart
from drivers.pc.vga import PlainRange, Vga
from drivers.pc.vga_render import Picture, render
from drivers.pc.xen_platform import DISKS, SECONDARY_DISKS, XenPlatform

ISA, ISA_FUNCTION, IDE_FUNCTION, PM_FUNCTION = 1, 0, 1, 3
VIDEO, PLATFORM = 2, 3
"""PCI device numbers, as QEMU's xenfv machine has them."""
VIDEO_BIOS: Final = "pci1234,1111.rom"
"""SeaBIOS takes an option ROM by this name in place of the device's own (src/optionroms.c): one transfer and not ten thousand reads."""
SLOTS: Final = ("hda", "hdb", "hdc", "hdd")
MAX_VIDEO_BIOS: Final = 1 << 17
BOOT_ROM: Final = "genroms/linuxboot.bin"
"""SeaBIOS runs option ROMs of such names; this one starts a kernel (domains.dom0.builder.linuxboot)."""
MAX_BOOT_ROM: Final = 1 << 16
MAX_INPUT: Final = 1 << 20
POLLED_BYTES: Final = 6
POLLED_NS: Final = 120_000_000
"""Two ticks of a BIOS's clock, at each of which it looks."""
BOOT_PATHS: Final = {
    "c": ("/pci@i0cf8/ide@1,1/drive@0/disk@0", "/pci@i0cf8/ide@1,1/drive@0/disk@1"),
    "d": ("/pci@i0cf8/ide@1,1/drive@1/disk@0", "/pci@i0cf8/ide@1,1/drive@1/disk@1"),
}
"""Of the letters of `boot=`: places in SeaBIOS's file `bootorder`."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A drive: `name` is hda to hdd, and of its image among the descriptors (an optical drive may have none)."""

    name: str
    cdrom: bool
    readonly: bool
    format: str

    @property
    def place(self) -> int:
        """0 to 3. ValueError."""
        if self.name not in SLOTS:
            raise ValueError(f"drive {self.name!r}: there are {', '.join(SLOTS)}")
        return SLOTS.index(self.name)


def open_medium(slot: Slot, files: dict[str, int]) -> Media | None:
    """The medium of a drive; None: an optical drive without one. ValueError, MediaError."""
    fd = files.get(slot.name)
    if fd is None:
        if slot.cdrom:
            return None
        raise ValueError(f"drive {slot.name}: its image did not come along")
    if slot.format == "qcow2":
        if not slot.readonly:
            raise ValueError(f"drive {slot.name}: qcow2 images are not written to")
        return Qcow2Media(fd)
    return RawMedia(fd, read_only=slot.readonly or slot.cdrom)


@dataclass(frozen=True, slots=True)
class Settings:
    """What Dom0 says of the PC."""

    serial: bool = True
    vga: str = "stdvga"
    boot: str = "cd"
    memory_mb: int = 128
    disks: tuple[Slot, ...] = ()
    files: dict[str, int] = field(default_factory=dict)
    """Descriptors by name."""
    name: str = "guest"
    vnc: VncSettings | None = None

    @classmethod
    def from_start(cls, start: Start) -> Settings:
        """From the settings and descriptors that were deposited with the warden."""
        given: dict[str, Any] = start.settings
        return cls(
            serial=bool(given.get("serial", True)),
            vga=str(given.get("vga", "stdvga")),
            boot=str(given.get("boot", "cd")),
            memory_mb=int(given.get("memory_mb", 128)),
            disks=tuple(
                Slot(str(d["slot"]), bool(d["cdrom"]), bool(d["readonly"]), str(d["format"]))
                for d in given.get("disks", ())
            ),
            files=dict(start.fds),
            name=str(given.get("name", "guest")),
            vnc=VncSettings.from_start(given.get("vnc")),
        )


def _video_bios(settings: Settings) -> bytes:
    fd = settings.files.get("video_bios")
    return b"" if fd is None else os.pread(fd, MAX_VIDEO_BIOS, 0)


def firmware_files(settings: Settings) -> dict[str, bytes]:
    """What SeaBIOS finds by name: where its console is besides the screen, and what it boots."""
    files: dict[str, bytes] = {}
    if settings.serial:
        files["etc/sercon-port"] = COM1.to_bytes(2, "little")
    places = [path for letter in settings.boot for path in BOOT_PATHS.get(letter, ())]
    rom = settings.files.get("boot_rom")
    if rom is not None:
        files[BOOT_ROM] = os.pread(rom, MAX_BOOT_ROM, 0)
        places.insert(0, f"/rom@{BOOT_ROM}")
    files["bootorder"] = "\n".join([*places, "HALT"]).encode() + b"\0"
    bios = _video_bios(settings)
    if settings.vga == "stdvga" and bios:
        files[VIDEO_BIOS] = bios
    files["etc/boot-menu-wait"] = (0).to_bytes(4, "little")
    return files


class SerialInput:
    """Bytes on their way into the serial line. Implements Timed.

    A BIOS that polls the line puts what it finds into its keyboard buffer, which has room for 15 keys, and drops the rest: software that does
    not take interrupts gets a few bytes at a time. A driver gets all at once.
    """

    def __init__(self, uart: Uart, now: Clock) -> None:
        self._uart: Final = uart
        self._now: Final = now
        self._waiting = bytearray()
        self._next: int | None = None

    def put(self, data: bytes) -> None:
        """More bytes; what finds no room is lost."""
        self._waiting += data[: MAX_INPUT - len(self._waiting)]
        if self._next is None:
            self.expire(self._now())

    def next_deadline(self) -> int | None:
        """See Timed."""
        return self._next

    def expire(self, now: int) -> None:
        """See Timed."""
        if self._next is not None and now < self._next:
            return
        count = POLLED_BYTES if self._uart.polled else len(self._waiting)
        taken = self._uart.receive(bytes(self._waiting[:count]))
        del self._waiting[:taken]
        self._next = now + POLLED_NS if self._waiting else None


class Board:
    """See the module. `now` is the host's monotonic clock, ns; `shutdown`: the guest is reset or powered off (SHUTDOWN_*)."""

    def __init__(
        self,
        settings: Settings,
        spaces: Spaces,
        guest: Guest,
        now: Clock,
        transmit: Callable[[int], None],
        shutdown: Callable[[int], None],
        log: Callable[[str], None],
    ) -> None:
        ports = spaces.ports
        self._guest: Final = guest
        self.uart: Final = Uart(lambda level: guest.isa_irq(COM1_IRQ, level), transmit)
        if settings.serial:
            self.uart.attach(ports, COM1)
        self._input: Final = SerialInput(self.uart, now)
        self.fw_cfg: Final = FwCfg(
            guest, firmware_files(settings), ram_size=settings.memory_mb << 20, vcpus=guest.vcpus
        )
        self.fw_cfg.attach(ports)
        reset = ResetControl(lambda hard: shutdown(SHUTDOWN_reboot))
        self.pci: Final = PciBus(ports, spaces.mmio, guest.pci_intx, reset, log)
        self.pci.attach()

        self.keyboard: Final = I8042(
            lambda level: guest.isa_irq(KEYBOARD_IRQ, level),
            lambda level: guest.isa_irq(AUX_IRQ, level),
            A20(guest.a20),
            lambda: shutdown(SHUTDOWN_reboot),
        )
        self.keyboard.attach(ports)
        self.platform: Final = XenPlatform(now, self._unplug, log)
        self.platform.attach(ports)
        self.pci.add(0, 0, I440fx())
        self.pci.add(ISA, ISA_FUNCTION, Piix3Isa(guest.set_link))
        self.ide: Final = IdeFunction(
            guest, (lambda level: guest.isa_irq(14, level), lambda level: guest.isa_irq(15, level)), now
        )
        self.ide.attach(ports)
        self._slots: Final[dict[Drive, tuple[str, Media | None]]] = {}
        for slot in settings.disks:
            self._plug(slot, open_medium(slot, settings.files))
        self.pci.add(ISA, IDE_FUNCTION, self.ide)
        self.pci.add(ISA, PM_FUNCTION, PmFunction())  # its registers are beside the vCPU
        self.vga: Vga | None = None
        self._shown: tuple[PlainRange, ...] = ()
        if settings.vga == "stdvga":
            vga = self.vga = Vga(guest.vram)
            vga.on_layout = self._layout
            vga.attach(ports)
            vga.attach_window(spaces.mmio)
            self.pci.add(VIDEO, 0, vga)
        self.pci.add(PLATFORM, 0, self.platform)
        self.unplugged: Callable[[list[str]], None] = lambda slots: None
        self._timed: Final[list[Timed]] = [self._input, self.ide]
        for problem in set_up_pci(ports):
            log(problem)

    def _plug(self, slot: Slot, medium: Media | None) -> None:
        serial = f"DOM{slot.place:05d}"
        drive: Drive
        if slot.cdrom:
            drive = OpticalDrive(medium, serial=serial)
        else:
            assert medium is not None
            drive = Disk(medium, serial=serial)
        self._slots[drive] = slot.name, medium
        self.ide.plug(slot.place, drive)

    def _unplug(self, mask: int) -> None:
        """The guest's PV drivers take over: the images are closed here, so that the back end can have them."""
        if not mask & (DISKS | SECONDARY_DISKS):
            return
        gone = self.ide.unplug_disks(keep_first=not mask & DISKS)
        names: list[str] = []
        for disk in gone:
            name, medium = self._slots.pop(disk)
            names.append(name)
            if medium is not None:
                medium.flush()
                medium.close()
        if names:
            self.unplugged(names)

    def _layout(self) -> None:
        """What of the frame buffer is plain memory of the guest has changed."""
        assert self.vga is not None
        wanted = self.vga.plain_ranges()
        whole = tuple(r for r in wanted if not (r.gpa | r.size | r.offset) & PAGE - 1)
        for old in self._shown:
            if old not in whole:
                self._guest.unmap_vram(old.gpa, old.size)
        for new in whole:
            if new not in self._shown:
                self._guest.map_vram(new.gpa, new.size, new.offset)
        self._shown = whole

    def picture(self, now: int) -> Picture | None:
        """The screen; None: there is none."""
        return None if self.vga is None else render(self.vga, now)

    def serial_input(self, data: bytes) -> None:
        """Bytes for the guest's serial line; what finds no room is lost."""
        self._input.put(data)

    def send_keys(self, keys: Sequence[str]) -> str:
        """Press and release keys, each a combination such as ctrl-alt-delete; why not, or ''."""
        try:
            combinations = [parse_combination(text) for text in keys]
        except ValueError as error:
            return str(error)[:200]
        for names in combinations:
            for name in names:
                self.keyboard.key(name, True)
            for name in reversed(names):
                self.keyboard.key(name, False)
        return ""

    def by_viewer(self, event: Event) -> None:
        """A key or the pointer of a VNC viewer."""
        if isinstance(event, KeyEvent):
            self.keyboard.key(event.key, event.pressed)
        else:
            self.keyboard.move_mouse(event.dx, event.dy, event.wheel, event.buttons)

    def next_deadline(self) -> int | None:
        """See Timed."""
        return earliest(self._timed)

    def expire(self, now: int) -> None:
        """See Timed."""
        for device in self._timed:
            device.expire(now)
