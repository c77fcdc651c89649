"""HYPERVISOR_platform_op: what the control domain asks of the machine (platform.h)."""

from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Bytes, Layout, Union, handle, u8, u16, u32, u64

XENPF_INTERFACE_VERSION: Final = 0x03000001
XENPF_settime32: Final = 17
XENPF_settime64: Final = 62
XENPF_settime: Final = XENPF_settime64
XENPF_add_memtype: Final = 31
XENPF_del_memtype: Final = 32
XENPF_read_memtype: Final = 33
XENPF_microcode_update: Final = 35
XENPF_platform_quirk: Final = 39
XENPF_efi_runtime_call: Final = 49
XENPF_firmware_info: Final = 50

XEN_FW_DISK_INFO: Final = 1
XEN_FW_DISK_MBR_SIGNATURE: Final = 2
XEN_FW_VBEDDC_INFO: Final = 3
XEN_FW_EFI_INFO: Final = 4
XEN_FW_EFI_VERSION: Final = 0
XEN_FW_EFI_CONFIG_TABLE: Final = 1
XEN_FW_EFI_VENDOR: Final = 2
XEN_FW_EFI_MEM_INFO: Final = 3
XEN_FW_EFI_RT_VERSION: Final = 4
XEN_FW_EFI_PCI_ROM: Final = 5
XEN_FW_EFI_APPLE_PROPERTIES: Final = 6
XEN_FW_KBD_SHIFT_FLAGS: Final = 5

XENPF_enter_acpi_sleep: Final = 51
XENPF_ACPI_SLEEP_EXTENDED: Final = 0x00000001
XENPF_change_freq: Final = 52
XENPF_getidletime: Final = 53
XENPF_set_processor_pminfo: Final = 54
XENPF_get_cpuinfo: Final = 55

XEN_PCPU_FLAGS_ONLINE: Final = 1
XEN_PCPU_FLAGS_INVALID: Final = 2

XENPF_get_cpu_version: Final = 48
XENPF_cpu_online: Final = 56
XENPF_cpu_offline: Final = 57
XENPF_cpu_hotadd: Final = 58
XENPF_mem_hotadd: Final = 59
XENPF_core_parking: Final = 60
XENPF_resource_op: Final = 61
XENPF_get_symbol: Final = 63


class xenpf_settime32(NamedTuple):
    secs: u32
    nsecs: u32
    system_time: u64


XENPF_SETTIME32: Final = Layout(xenpf_settime32)


class xenpf_settime64(NamedTuple):
    secs: u64
    nsecs: u32
    mbz: u32
    system_time: u64


XENPF_SETTIME64: Final = Layout(xenpf_settime64)


class xenpf_firmware_info_disk_info(NamedTuple):
    device: u8
    version: u8
    interface_support: u16
    legacy_max_cylinder: u16
    legacy_max_head: u8
    legacy_sectors_per_track: u8
    edd_params: handle


XENPF_FIRMWARE_INFO_DISK_INFO: Final = Layout(
    xenpf_firmware_info_disk_info, c="__typeof__(((struct xenpf_firmware_info *)0)->u.disk_info)"
)


class xenpf_firmware_info_disk_mbr_signature(NamedTuple):
    device: u8
    mbr_signature: u32


XENPF_FIRMWARE_INFO_DISK_MBR_SIGNATURE: Final = Layout(
    xenpf_firmware_info_disk_mbr_signature,
    c="__typeof__(((struct xenpf_firmware_info *)0)->u.disk_mbr_signature)",
)


class xenpf_firmware_info_vbeddc_info(NamedTuple):
    capabilities: u8
    edid_transfer_time: u8
    edid: handle


XENPF_FIRMWARE_INFO_VBEDDC_INFO: Final = Layout(
    xenpf_firmware_info_vbeddc_info, c="__typeof__(((struct xenpf_firmware_info *)0)->u.vbeddc_info)"
)


class xenpf_firmware_info_efi_info_cfg(NamedTuple):
    addr: u64
    nent: u32


XENPF_FIRMWARE_INFO_EFI_INFO_CFG: Final = Layout(
    xenpf_firmware_info_efi_info_cfg, c="__typeof__(((struct xenpf_firmware_info *)0)->u.efi_info.cfg)"
)


class xenpf_firmware_info_efi_info_vendor(NamedTuple):
    revision: u32
    bufsz: u32
    name: handle


XENPF_FIRMWARE_INFO_EFI_INFO_VENDOR: Final = Layout(
    xenpf_firmware_info_efi_info_vendor, c="__typeof__(((struct xenpf_firmware_info *)0)->u.efi_info.vendor)"
)


class xenpf_firmware_info_efi_info_mem(NamedTuple):
    addr: u64
    size: u64
    attr: u64
    type: u32


XENPF_FIRMWARE_INFO_EFI_INFO_MEM: Final = Layout(
    xenpf_firmware_info_efi_info_mem, c="__typeof__(((struct xenpf_firmware_info *)0)->u.efi_info.mem)"
)


class xenpf_firmware_info_efi_info_pci_rom(NamedTuple):
    segment: u16
    bus: u8
    devfn: u8
    vendor: u16
    devid: u16
    address: u64
    size: u64


XENPF_FIRMWARE_INFO_EFI_INFO_PCI_ROM: Final = Layout(
    xenpf_firmware_info_efi_info_pci_rom,
    c="__typeof__(((struct xenpf_firmware_info *)0)->u.efi_info.pci_rom)",
)


class xenpf_firmware_info_efi_info_apple_properties(NamedTuple):
    address: u64
    size: u64


XENPF_FIRMWARE_INFO_EFI_INFO_APPLE_PROPERTIES: Final = Layout(
    xenpf_firmware_info_efi_info_apple_properties,
    c="__typeof__(((struct xenpf_firmware_info *)0)->u.efi_info.apple_properties)",
)


class xenpf_firmware_info(NamedTuple):
    type: u32
    index_: u32
    u: Annotated[
        bytes,
        Union(
            disk_info=xenpf_firmware_info_disk_info,
            disk_mbr_signature=xenpf_firmware_info_disk_mbr_signature,
            vbeddc_info=xenpf_firmware_info_vbeddc_info,
            efi_info=Annotated[
                bytes,
                Union(
                    version=u32,
                    cfg=xenpf_firmware_info_efi_info_cfg,
                    vendor=xenpf_firmware_info_efi_info_vendor,
                    mem=xenpf_firmware_info_efi_info_mem,
                    pci_rom=xenpf_firmware_info_efi_info_pci_rom,
                    apple_properties=xenpf_firmware_info_efi_info_apple_properties,
                ),
            ],
            kbd_shift_flags=u8,
        ),
    ]


XENPF_FIRMWARE_INFO: Final = Layout(xenpf_firmware_info, c_fields={"index_": "index"})


class xenpf_getidletime(NamedTuple):
    cpumap_bitmap: handle
    cpumap_nr_cpus: u32
    idletime: handle
    now: u64


XENPF_GETIDLETIME: Final = Layout(xenpf_getidletime)


class xenpf_pcpuinfo(NamedTuple):
    xen_cpuid: u32
    max_present: u32
    flags: u32
    apic_id: u32
    acpi_id: u32


XENPF_PCPUINFO: Final = Layout(xenpf_pcpuinfo)


class xenpf_pcpu_version(NamedTuple):
    xen_cpuid: u32
    max_present: u32
    vendor_id: Annotated[bytes, Bytes(12)]
    family: u32
    model: u32
    stepping: u32


XENPF_PCPU_VERSION: Final = Layout(xenpf_pcpu_version)


class xenpf_cpu_ol(NamedTuple):
    cpuid: u32


XENPF_CPU_OL: Final = Layout(xenpf_cpu_ol)


class xen_platform_op(NamedTuple):
    """Envelope of every platform operation."""

    cmd: u32
    interface_version: u32
    u: Annotated[
        bytes,
        Union(
            settime32=xenpf_settime32,
            settime64=xenpf_settime64,
            firmware_info=xenpf_firmware_info,
            getidletime=xenpf_getidletime,
            pcpu_info=xenpf_pcpuinfo,
            pcpu_version=xenpf_pcpu_version,
            cpu_ol=xenpf_cpu_ol,
            pad=Annotated[bytes, Bytes(128)],
        ),
    ]


XEN_PLATFORM_OP: Final = Layout(xen_platform_op)
