"""The warden of the demo's machine: as always, but that its NVMe processes can be told to attack (`toolstack.demo.rogue`).

The product has no such way in: this program puts another module in the warden's table.
"""

from __future__ import annotations

from toolstack.warden import children, warden
from toolstack.warden.__main__ import main

if __name__ == "__main__":
    children.MODULES["nvme"] = "toolstack.demo.rogue"
    # The hypervisor gives a granter's process one second for its answer: on a busy host DomIO is to have loaded its code by then.
    warden.PRESTARTED["domio"] = 1
    main()
