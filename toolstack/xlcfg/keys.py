"""Every key of xl.cfg(5): understood, ignored with a warning because that is harmless, or refused with the mend."""

from __future__ import annotations

from typing import Final

UNDERSTOOD: Final[dict[str, str]] = {
    "name": "string",
    "type": "string",
    "builder": "string",
    "kernel": "string",
    "ramdisk": "string",
    "cmdline": "string",
    "root": "string",
    "extra": "string",
    "memory": "number",
    "maxmem": "number",
    "vcpus": "number",
    "maxvcpus": "number",
    "cpus": "string or list",
    "cpu_weight": "number",
    "cap": "number",
    "on_poweroff": "string",
    "on_reboot": "string",
    "on_watchdog": "string",
    "on_crash": "string",
    "on_soft_reset": "string",
    "uuid": "string",
    "disk": "list",
    "vif": "list",
    "pci": "list",
    "boot": "string",
    "serial": "string or list",
    "vga": "string",
    "pvshim": "boolean",
    "pvshim_path": "string",
    "pvshim_cmdline": "string",
    "pvshim_extra": "string",
    "hap": "number",
    "localtime": "boolean",
    "rtc_timeoffset": "number",
    "firmware_override": "string",
    "bios_path_override": "string",
    "vnc": "number",
    "vnclisten": "string",
    "vncdisplay": "number",
    "vncunused": "number",
    "vncpasswd": "string",
}
"""Key -> kind of its value."""

SHIM_KEYS: Final = ("pvshim", "pvshim_path", "pvshim_cmdline", "pvshim_extra")
SHIM_CMDLINE: Final = "pv-shim console=xen,pv"
"""What the shim is told where the file says nothing, as libxl has it."""

REFUSED: Final[dict[str, str]] = {
    "bootloader": "guests are not booted from inside their disks: give kernel= and ramdisk=",
    "dtdev": "there is no device tree on x86: leave it out",
    "device_tree": "there is no device tree on x86: leave it out",
    "ioports": "no host I/O ports are handed out: leave it out",
    "irqs": "no host interrupts are handed out: leave it out",
    "iomem": "no host memory is handed out: leave it out",
    "usbctrl": "there is no USB: leave it out",
    "usbdev": "there is no USB: leave it out",
    "usbdevice": "there is no USB: leave it out",
    "usb": "there is no USB: leave it out",
    "vtpm": "there is no virtual TPM: leave it out",
    "p9": "there is no 9pfs backend: put the files into a disk= or the ramdisk=",
    "pvcalls": "there is no pvcalls backend: use vif=",
    "channel": "there are no PV channels: use the console",
    "vdispl": "there is no PV display: use the console",
    "vsnd": "there is no PV sound: leave it out",
    "vscsi": "there is no PV SCSI: use disk=",
    "vkb": "there is no PV keyboard: use the console",
    "virtio": "there is no virtio: use disk= and vif=",
    "gfx_passthru": "no graphics card is handed out: leave it out",
    "driver_domain": "the machine has a driver domain of its own: leave it out",
    "device_model_stubdomain_override": "there are no stub domains: leave it out",
    "nestedhvm": "nested virtualization is not emulated: leave it out",
    "altp2m": "there is no altp2m: leave it out",
    "altp2mhvm": "there is no altp2m: leave it out",
    "vnuma": "virtual NUMA is not offered: leave it out",
    "vmtrace_buf_kb": "there is no processor trace: leave it out",
    "viommu": "guests have no virtual IOMMU: leave it out",
    "ms_vm_genid": "there is no generation id: leave it out",
    "tee": "there is no trusted environment: leave it out",
    "acpi_firmware": "no ACPI tables are added: leave it out",
    "smbios_firmware": "no SMBIOS tables are added: leave it out",
    "device_model_override": "the device model is the machine's own: leave it out",
    "colo": "COLO is not offered: leave it out",
}
"""Not offered: key -> why, and the mend. An empty list, '' and 0 mean the same as leaving the key out."""

_HOST: Final = "the machine's own devices and display take its place"
_TUNING: Final = "it tunes real hardware"
IGNORED: Final[dict[str, str]] = {
    **dict.fromkeys(
        (
            *(
                "sdl",
                "opengl",
                "keymap",
                "vfb",
                "display",
            ),
            *(
                "xauthority",
                "spice",
                "spicehost",
                "spiceport",
                "spicetls_port",
                "spicedisable_ticketing",
                "spicepasswd",
            ),
            *("spiceagent_mouse", "spicevdagent", "spice_clipboard_sharing", "spiceusbredirection"),
            *(
                "spice_image_compression",
                "spice_streaming_video",
                "stdvga",
                "videoram",
                "nographic",
                "soundhw",
            ),
            *(
                "device_model",
                "device_model_version",
                "device_model_user",
                "device_model_args",
                "dm_restrict",
            ),
            *("device_model_args_pv", "device_model_args_hvm", "stubdomain_kernel", "stubdomain_cmdline"),
            *("stubdomain_ramdisk", "stubdomain_memory", "xen_platform_pci", "vendor_device", "hdtype"),
            *("bios", "firmware"),
        ),
        _HOST,
    ),
    **dict.fromkeys(
        (
            *(
                "cpus_soft",
                "pool",
                "nodes",
                "oos",
                "shadow_memory",
                "vuart",
                "gic_version",
                "vpmu",
                "sve",
            ),
            *(
                "acpi_s3",
                "acpi_s4",
                "acpi_laptop_slate",
                "hpet",
                "vpt_align",
                "timer_mode",
                "tsc_mode",
                "viridian",
            ),
            *(
                "mmio_hole",
                "rdm",
                "rdm_mem_boundary",
                "passthrough",
                "gfx_passthru_kind",
                "max_event_channels",
            ),
            *(
                "assisted_xapic",
                "assisted_x2apic",
                "nomigrate",
                "claim_mode",
                "vm_notify",
                "xenpci_bar_uc",
                "suppress_vmdesc",
            ),
            *(
                "msr_relaxed",
                "trap_unmapped_accesses",
                "pci_msitranslate",
                "pci_power_mgmt",
                "pci_permissive",
                "pci_seize",
            ),
            *("nestedhvm_caps", "llc_colors", "force_assign_without_iommu"),
        ),
        _TUNING,
    ),
    **dict.fromkeys(
        ("seclabel", "init_seclabel", "device_model_stubdomain_seclabel"),
        "there is no XSM policy to apply it to",
    ),
    **dict.fromkeys(("bootloader_args", "bootloader_restrict", "bootloader_user"), "no bootloader runs"),
    **dict.fromkeys(
        ("max_grant_frames", "max_maptrack_frames", "max_grant_version"), "the machine's limits apply"
    ),
    **dict.fromkeys(
        (
            "pae",
            "acpi",
            "apic",
            "nx",
            "cpuid",
            "cpuid_consistent",
            "e820_host",
        ),
        "the processor that guests see is fixed",
    ),
    **dict.fromkeys(
        ("xend_suspend_evtchn_compat", "vtsc", "features", "uname", "blkdev_start", "loader"),
        "it steers xl itself",
    ),
}
"""Harmless to leave out: key -> why."""
