"""From a domain's files to what its builder takes: the kernel that starts, and the modules beside it.

A PVH guest with a shim starts Xen's shim; the PV kernel is its first module, with the guest's command line, and the ramdisk the
second (as libxl has it). The shim gets the kernel unpacked: to unpack it on the emulated processor would take it a minute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bus.abi.hvm.e820 import HVM_BELOW_4G_RAM_END
from bus.messages.control import DomainConfig
from domains.dom0.builder.errors import BuildError
from domains.dom0.builder.kernel import Kernel, load_kernel
from domains.dom0.builder.linuxboot import DirectBoot, direct_boot
from domains.dom0.builder.pvh import Module
from domains.dom0.toolstack.guest import ToolstackError
from domains.dom0.toolstack.images import read_file

NO_FILE: Final = b""


@dataclass(frozen=True, slots=True)
class Files:
    """What a PV or PVH guest is built from."""

    kernel: Kernel
    cmdline: str
    ramdisk: bytes
    """Of a PV guest."""
    modules: tuple[Module, ...]
    """Of a PVH guest."""


def load_files(config: DomainConfig, files: dict[int, int]) -> Files:
    """Read and parse all. `files`: index in the configuration -> descriptor. ToolstackError."""
    kernel = _kernel(config.name, files, config.kernel, config.kernel_path)
    ramdisk = NO_FILE
    if config.ramdisk >= 0:
        ramdisk = _content(config.name, files, config.ramdisk, config.ramdisk_path, "ramdisk")
    modules = (Module(ramdisk),) if ramdisk else ()
    if config.shim < 0:
        return Files(kernel, config.cmdline, ramdisk, modules)
    if config.type != "pvh":
        raise ToolstackError(f"{config.name}: pvshim: only a PVH guest (type='pvh') starts in Xen's shim")
    if kernel.notes is None:
        raise ToolstackError(f"{config.kernel_path}: kernel: no Xen ELF notes: not a kernel for Xen")
    shim = _kernel(config.name, files, config.shim, config.shim_path)
    inner = Module(kernel.content, config.cmdline.encode())
    return Files(shim, config.shim_cmdline, NO_FILE, (inner, *modules))


def load_direct(config: DomainConfig, files: dict[int, int]) -> DirectBoot | None:
    """The kernel that a full HVM guest starts directly; None: it boots from its disks. ToolstackError."""
    if config.kernel < 0:
        if config.ramdisk >= 0:
            raise ToolstackError(f"{config.name}: ramdisk: only with a kernel")
        return None
    kernel = _content(config.name, files, config.kernel, config.kernel_path, "kernel")
    ramdisk = NO_FILE
    if config.ramdisk >= 0:
        ramdisk = _content(config.name, files, config.ramdisk, config.ramdisk_path, "ramdisk")
    low = min(config.memory_mb << 20, HVM_BELOW_4G_RAM_END)
    try:
        return direct_boot(kernel, ramdisk, config.cmdline, low)
    except BuildError as error:
        raise ToolstackError(f"{config.kernel_path}: {error}") from None


def _kernel(name: str, files: dict[int, int], index: int, path: str) -> Kernel:
    content = _content(name, files, index, path, "kernel")
    try:
        return load_kernel(content)
    except (BuildError, ValueError, MemoryError) as error:
        raise ToolstackError(f"{path}: {error or 'no memory for it'}") from None


def _content(name: str, files: dict[int, int], index: int, path: str, what: str) -> bytes:
    if index not in files:
        raise ToolstackError(f"{name}: no {what} given")
    try:
        return read_file(files[index], path)
    except (ValueError, OSError, MemoryError) as error:
        raise ToolstackError(f"{path}: {error or 'no memory for it'}") from None
