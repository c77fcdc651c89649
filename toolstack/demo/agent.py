"""The agent of the demo's NVMe container: as always, but that its process can be told to attack (`toolstack.demo.rogue`).

The product has no such way in: this program puts another module in the agent's table.
"""

from __future__ import annotations

import sys

from toolstack.warden import children
from toolstack.warden.agent import main

if __name__ == "__main__":
    children.MODULES["nvme"] = "toolstack.demo.rogue"
    sys.exit(main())
