"""The nodes of a guest in the store, as libxl writes them."""

from __future__ import annotations

from bus.addresses import Port
from domains.dom0.toolstack.guest import Guest
from domains.dom0.xenstore_service import XenstoreService


def write_vnc_nodes(store: XenstoreService, guest: Guest) -> None:
    """Where its VNC server listens, as libxl tells it. Not the password: the guest can read what is here."""
    if guest.model is None or guest.model.vnc is None:
        return
    address, port = guest.model.vnc
    for name, value in (("vnc-listen", address), ("vnc-port", str(port))):
        store.write(f"/local/domain/{guest.domid}/console/{name}", value)


def write_guest_nodes(store: XenstoreService, guest: Guest, console_mfn: int, console_port: Port) -> None:
    """What a guest and the tools expect to find (docs/misc/xenstore-paths). The console's ring is at `console_mfn`."""
    config, domid = guest.config, guest.domid
    base, own = f"/local/domain/{domid}", f"r{domid}"
    text = guest.uuid.hex()
    uuid = "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
    store.remove(base)
    store.mkdir(base)
    store.permit(base, "n0", own)
    readable = {
        "vm": f"/vm/{uuid}",
        "name": config.name,
        "domid": str(domid),
        "cpu/0/availability": "online",
        "memory/static-max": str(max(config.memory_mb, config.maxmem_mb) << 10),
        "memory/target": str(config.memory_mb << 10),
        "memory/videoram": "0",
        "console/backend": f"/local/domain/0/backend/console/{domid}/0",
        "console/backend-id": "0",
        "console/type": "xenconsoled",
        "console/limit": "1048576",
        "console/output": "pty",
        "console/tty": guest.console.tty,
        "console/port": str(console_port),
        "console/ring-ref": str(console_mfn),
        "store/port": str(guest.xenstore_port),
        "control/platform-feature-multiprocessor-suspend": "1",
        "control/platform-feature-xs_reset_watches": "1",
    }
    if config.bios >= 0:
        readable["hvmloader/bios"] = "seabios"
    for vcpu in range(1, config.maxvcpus or config.vcpus):
        readable[f"cpu/{vcpu}/availability"] = "online" if vcpu < config.vcpus else "offline"
    for path, value in readable.items():
        store.write(f"{base}/{path}", value)
    owned = (
        "data",
        "drivers",
        "feature",
        "attr",
        "error",
        "device/suspend/event-channel",
        "control/shutdown",
        "control/feature-poweroff",
        "control/feature-reboot",
        "control/feature-suspend",
        "control/sysrq",
    )
    for path in owned:
        store.write(f"{base}/{path}", "")
        store.permit(f"{base}/{path}", f"n{domid}")
    for path in ("device", "control", "console", "store", "memory", "cpu"):
        store.mkdir(f"{base}/{path}")
    store.write(f"/vm/{uuid}/name", config.name)
    store.write(f"/vm/{uuid}/uuid", uuid)
    store.permit(f"/vm/{uuid}", "n0", own)
