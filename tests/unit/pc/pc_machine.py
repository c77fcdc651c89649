"""A whole PC of these devices around the project's vCPU, in one process and without Xen: for running real firmware on them."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path
from uuid import UUID

from bus.addresses import MachineAddr
from domains.dom0.builder.firmware.layout import FirmwareConfig, build_firmware
from domains.vcpu.api import StopReason
from domains.vcpu.hvm_vcpu import UnicornHvmVcpu
from drivers.hw.nvme.media import RawMedia
from drivers.pc.acpi_pm import AcpiPm
from drivers.pc.bus import GuestMemoryError, MmioSpace, PortSpace, earliest
from drivers.pc.fabric import Fabric
from drivers.pc.fw_cfg import FwCfg
from drivers.pc.i440fx import I440fx
from drivers.pc.i8042 import I8042
from drivers.pc.ide_cd import OpticalDrive
from drivers.pc.ide_disk import Disk
from drivers.pc.ide_pci import IdeFunction
from drivers.pc.keys import keys_of_character
from drivers.pc.pci import PciBus
from drivers.pc.pci_setup import set_up_pci
from drivers.pc.pic import PicPair
from drivers.pc.piix3 import Piix3Isa
from drivers.pc.pit import Pit
from drivers.pc.rtc import Rtc, cmos_for_firmware
from drivers.pc.system import A20, DebugPort, Port92, PostCode, ResetControl
from drivers.pc.uart import Uart
from drivers.pc.vga import VRAM, WINDOW, WINDOW_SIZE, Vga
from drivers.pc.vga_render import text_lines

BIOS_END = 1 << 32
HOLE = 0xF000_0000
BLOCKS = 20_000


class Machine:
    """64 MiB unless said otherwise; `disk`, `cdrom` are image files."""

    def __init__(
        self,
        bios: Path,
        vgabios: Path,
        *,
        memory: int = 64 << 20,
        disk: Path | None = None,
        cdrom: Path | None = None,
        boot: str = "c",
        xen: bool = False,
    ) -> None:
        self.size = memory
        self.ram = mmap.mmap(-1, memory)
        self.video = mmap.mmap(-1, VRAM)
        self.host = ctypes.addressof(ctypes.c_char.from_buffer(self.ram))
        self.video_host = ctypes.addressof(ctypes.c_char.from_buffer(self.video))
        self.start = time.perf_counter_ns()
        self.log, self.serial = bytearray(), bytearray()
        self.ports, self.mmio = PortSpace(), MmioSpace()
        self.exits = {"in": 0, "out": 0, "read": 0, "write": 0}
        self.resets = 0
        self.vcpu = UnicornHvmVcpu(self)
        self.layout_changed = False
        self.mapped: list[tuple[int, int]] = []
        self._make_devices(vgabios.read_bytes(), boot)
        if disk is not None:
            self.ide.plug(0, Disk(RawMedia(os.open(disk, os.O_RDWR)), serial="D1"))
        if cdrom is not None:
            self.ide.plug(2, OpticalDrive(RawMedia(os.open(cdrom, os.O_RDONLY), read_only=True), serial="C1"))
        image = bios.read_bytes()
        self.rom = mmap.mmap(-1, len(image))
        self.rom[:] = image
        self.ram[(1 << 20) - len(image) : 1 << 20] = image
        self._map_memory(len(image))
        self.xen = xen
        self.hypercalls: list[int] = []
        if xen:
            self._as_hvmloader(image)

    def _as_hvmloader(self, bios: bytes) -> None:
        """What the toolstack does for an HVM guest."""
        config = FirmwareConfig(self.size, 0, 1, UUID("12345678-1234-5678-1234-567812345678"), hpet=False)
        self.firmware = build_firmware(config, bios)
        pages = self.firmware.special_pages()
        self.special = mmap.mmap(-1, len(pages) << 12)
        for address, data in self.firmware.pieces:
            memory, at = (
                (self.special, address - (pages.start << 12))
                if address >= 0xFC00_0000
                else (self.ram, address)
            )
            memory[at : at + len(data)] = data
        where = MachineAddr(pages.start << 12)
        self.vcpu.unmap(where, len(self.special))
        self.vcpu.map(where, ctypes.addressof(ctypes.c_char.from_buffer(self.special)), len(self.special))
        assert set_up_pci(self.ports) == []

    def _make_devices(self, vgabios: bytes, boot: str) -> None:
        self.pic = PicPair(self._intr)
        fabric = Fabric(self.pic.set_line, lambda number, level: None)
        self.pit = Pit(self.now, fabric.isa_line(0))
        self.rtc = Rtc(self.now, fabric.isa_line(8), int(time.time()))
        cmos_for_firmware(self.rtc.memory, low_memory=self.size, high_memory=0, boot=boot, vcpus=1)
        self.uart = Uart(fabric.isa_line(4), self.serial.append)
        self.a20 = A20(lambda on: self.vcpu.set_a20(on))
        self.keyboard = I8042(fabric.isa_line(1), fabric.isa_line(12), self.a20, self._reset)
        self.bus = PciBus(self.ports, self.mmio, fabric.set_intx, ResetControl(lambda hard: self._reset()))
        self.pm = AcpiPm(self.now, fabric.isa_line(9), lambda kind: self._stop("sleep"))
        self.ide = IdeFunction(self, (fabric.isa_line(14), fabric.isa_line(15)), lambda: 0)
        self.vga = Vga(memoryview(self.video), vgabios)
        self.vga.on_layout = self._layout
        self.stopped = ""
        for device in (
            self.pic,
            self.pit,
            self.rtc,
            self.uart,
            self.keyboard,
            self.pm,
            self.ide,
            self.vga,
            PostCode(),
        ):
            device.attach(self.ports)
        Port92(self.a20, self._reset).attach(self.ports)
        DebugPort(0x402, self.log.append).attach(self.ports)
        DebugPort(0xE9, self.log.append).attach(self.ports)
        FwCfg(self, {}, ram_size=self.size, vcpus=1).attach(self.ports)
        self.bus.attach()
        self.vga.attach_window(self.mmio)
        for slot, function, target in (
            (0, 0, I440fx()),
            (1, 0, Piix3Isa(fabric.set_route)),
            (1, 1, self.ide),
            (1, 3, self.pm),
            (2, 0, self.vga),
        ):
            self.bus.add(slot, function, target)
        self.timed = (self.pit, self.rtc, self.pm)

    def _map_memory(self, bios: int) -> None:
        self.vcpu.map(MachineAddr(0), self.host, WINDOW)
        self.vcpu.map_mmio(MachineAddr(WINDOW), WINDOW_SIZE)
        self.vcpu.map(MachineAddr(0xC0000), self.host + 0xC0000, self.size - 0xC0000)
        rom = ctypes.addressof(ctypes.c_char.from_buffer(self.rom))
        self.vcpu.map_mmio(MachineAddr(self.size), 0xFFF0_0000 - self.size)
        self.vcpu.map(MachineAddr(BIOS_END - bios), rom, bios)

    # -- what devices ask for

    def now(self) -> int:
        return time.perf_counter_ns() - self.start

    def read(self, gpa: int, length: int) -> bytes:
        if gpa + length > self.size:
            raise GuestMemoryError(f"{gpa:#x}")
        return self.ram[gpa : gpa + length]

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        if gpa + len(data) > self.size:
            raise GuestMemoryError(f"{gpa:#x}")
        self.ram[gpa : gpa + len(data)] = data
        self.dirty.append((gpa, len(data)))
        self.vcpu.request_stop()

    def _intr(self, level: bool) -> None:
        if level:
            self.vcpu.request_stop()

    def _reset(self) -> None:
        self.resets += 1
        self._stop("reset")

    def _stop(self, why: str) -> None:
        self.stopped = why
        self.vcpu.request_stop()

    def _layout(self) -> None:
        self.layout_changed = True
        self.vcpu.request_stop()

    # -- exits

    def on_port_in(self, port: int, size: int) -> int:
        self.exits["in"] += 1
        return self.ports.read(port, size)

    def on_port_out(self, port: int, size: int, value: int) -> None:
        self.exits["out"] += 1
        self.ports.write(port, size, value)

    def on_mmio_read(self, address: int, size: int) -> int:
        self.exits["read"] += 1
        return self.mmio.read(address, size)

    def on_mmio_write(self, address: int, size: int, value: int) -> None:
        self.exits["write"] += 1
        self.mmio.write(address, size, value)

    def on_cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        if self.xen and leaf == 0x4000_0000:
            return 0x4000_0002, 0x566E_6558, 0x6558_4D4D, 0x4D4D_566E
        if self.xen and 0x4000_0000 < leaf < 0x4000_0003:
            return (4 << 16 | 17, 0, 0, 0) if leaf == 0x4000_0001 else (1, 0x4000_0000, 0, 0)
        a, b, c, d = self.vcpu.native_cpuid(leaf, subleaf)
        return (a, b, c & ~(1 << 21 | 1 << 24), d & ~(1 << 9)) if leaf == 1 else (a, b, c, d)

    def on_rdmsr(self, index: int) -> int:
        return 0

    def on_wrmsr(self, index: int, value: int) -> None:
        if index == 0x4000_0000:
            for number in range(64):
                code = b"\xb8" + number.to_bytes(4, "little") + b"\x0f\x01\xc1\xc3"
                self.ram[value + 32 * number : value + 32 * number + len(code)] = code

    def on_hypercall(self) -> None:
        regs = self.vcpu.regs
        self.hypercalls.append(regs.rax)
        regs.rax = 0

    def on_rdtsc(self) -> int:
        return self.now()

    def on_cr_write(self, register: int, value: int) -> int:
        return value

    def on_cr8_read(self) -> int:
        return 0

    def on_cr8_write(self, priority: int) -> None:
        pass

    def on_invlpg(self, address: int) -> None:
        pass

    # -- running

    dirty: list[tuple[int, int]]

    def _remap(self) -> None:
        self.layout_changed = False
        for address, size in self.mapped:
            self.vcpu.unmap(MachineAddr(address), size)
            self.vcpu.map_mmio(MachineAddr(address), size)
        self.mapped = []
        for plain in self.vga.plain_ranges():
            self.vcpu.unmap(MachineAddr(plain.gpa), plain.size)
            self.vcpu.map(MachineAddr(plain.gpa), self.video_host + plain.offset, plain.size)
            self.mapped.append((plain.gpa, plain.size))
        self.vcpu.flush_tlb()

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in text_lines(self.vga)).rstrip()

    def type(self, text: str) -> None:
        for character in text:
            keys = keys_of_character(character)
            for key in keys:
                self.keyboard.key(key, True)
            for key in reversed(keys):
                self.keyboard.key(key, False)

    def run(self, seconds: float, until: object = None) -> bool:
        """To `until()` (True), or that long (False). StopReason that ends a machine raises."""
        self.dirty = []
        end = self.now() + int(seconds * 1e9)
        looked = 0
        while self.now() < end and not self.stopped:
            now = self.now()
            for device in self.timed:
                device.expire(now)
            if self.pic.asserted and self.vcpu.interrupts_open() and not self.vcpu.interrupt_pending():
                self.vcpu.inject_interrupt(self.pic.acknowledge())
            reason = self.vcpu.run(1000 if self.pic.asserted else BLOCKS)
            for gpa, length in self.dirty:
                self.vcpu.drop_code(
                    MachineAddr(gpa & ~0xFFF), (gpa + length + 0xFFF & ~0xFFF) - (gpa & ~0xFFF)
                )
            self.dirty.clear()
            if self.layout_changed:
                self._remap()
            if reason is StopReason.HALT and not self.pic.asserted:
                at = earliest(self.timed)
                pause = 0.01 if at is None else max(0.0, min((at - self.now()) / 1e9, 0.01))
                time.sleep(pause)
            elif reason in (StopReason.TRIPLE_FAULT, StopReason.BAD_ACCESS):
                raise AssertionError(
                    f"{reason} at {self.vcpu.regs.rip:#x} {getattr(self.vcpu, 'bad_access', None)}"
                )
            if callable(until) and now - looked > 20_000_000:
                looked = now
                if until():
                    return True
        return bool(callable(until) and until())
