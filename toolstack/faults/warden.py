"""The warden of a machine with a fault plan: as always, but that processes are started with observers at their edges.

The product has no such way in: this program puts other modules in the warden's table."""

from __future__ import annotations

from toolstack.warden import children
from toolstack.warden.__main__ import main

if __name__ == "__main__":
    for role in ("hypervisor", "dom0", "domio", "netio", "nvme"):
        children.MODULES[role] = f"simulation.live.{role}"
    main()
