"""Twenty boots of Debian's Linux in a row, for each kind of guest: none hangs. A boot that hangs now and then is a lost notification."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.machines import running_machine
from toolstack.guestfetch import INIT_LINE, debian

pytestmark = [pytest.mark.long, pytest.mark.timeout(3000)]
BOOTS = 20
BOOT_S = 120.0


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_twenty_boots_in_a_row(kind: str) -> None:
    """One and two vCPUs in turn, on one machine; each powers off when told, and everything is given back."""
    guest = debian()
    kernel = guest.kernel if kind == "pv" else guest.pvh_kernel
    assert kernel is not None
    with running_machine() as machine:
        for number in range(BOOTS):
            name = f"boot{number}"
            more: dict[str, Any] = {"type": kind, "vcpus": 1 + number % 2}
            machine.create(
                name, kernel, ramdisk=guest.ramdisk, memory_mb=128, cmdline=f"{guest.cmdline} quiet", **more
            )
            machine.expect(name, INIT_LINE, BOOT_S)
            machine.expect(name, "# ", BOOT_S)
            machine.type(name, "poweroff -f\n")
            assert machine.wait_end(name, BOOT_S) == "poweroff"
        machine.settled()
