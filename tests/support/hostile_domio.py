"""DomIO in an attacker's hands (a program, in place of `domains.domio`): before it serves, it tries with its own credentials what is
not its business. Told on standard output: `HOSTILE {attempt: return value}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from bus.abi import domctl, xen
from bus.addresses import DomId, GrantRef, Port
from bus.messages.device import Inspect, Plug
from domains.domio import __main__ as honest
from domains.native.domain import GrantError, HypercallError, NativeDomain


def outcome(attempt: Callable[[], object]) -> int | str:
    """0: it was let do it; else minus the errno or the grant status."""
    try:
        found = attempt()
    except HypercallError as error:
        return -(error.errno or 0)
    except GrantError as error:
        return error.status
    return found if isinstance(found, int) else 0


def attempts(host: NativeDomain) -> dict[str, int | str]:
    """All of them."""
    link = host.link

    def plug() -> int:
        token = link.next_token()
        return link.exchange(Plug(token=token, bdf=0x88, role="nvme", name="mine"), token)[0]

    def inspect() -> int:
        token = link.next_token()
        return link.exchange(Inspect(token=token, what="iommu"), token)[0]

    def domctl_of(cmd: int, domain: int) -> int:
        request = domctl.XEN_DOMCTL.zero()._replace(
            cmd=cmd, interface_version=domctl.XEN_DOMCTL_INTERFACE_VERSION, domain=domain
        )
        return host.hypercall(xen.HYPERVISOR_domctl, cmd, domctl.XEN_DOMCTL.pack(request))[0]

    tried: dict[str, int | str] = {
        "plug": outcome(plug),
        "inspect": outcome(inspect),
        "destroy neighbour": outcome(lambda: domctl_of(domctl.XEN_DOMCTL_destroydomain, 1)),
        "pause Dom0": outcome(lambda: domctl_of(domctl.XEN_DOMCTL_pausedomain, 0)),
        "assign a device": outcome(lambda: domctl_of(domctl.XEN_DOMCTL_assign_device, host.domid)),
        "bind another's port": outcome(lambda: host.bind_interdomain(DomId(1), Port(1), lambda: None)),
        "another's device": outcome(lambda: host.device_read(0x88, -1, 0, 4)),
        "interrupt of another's device": outcome(lambda: host.bind_msi(0x88, 0, lambda: None)),
    }
    for domid in (0, 1):
        granted = []
        for ref in range(64):
            try:
                host.map_grants(DomId(domid), [GrantRef(ref)])
                granted.append(ref)
            except GrantError:
                pass
        tried[f"grants of domain {domid}"] = len(granted)
    return tried


class HostileDomIo(honest.DomIo):
    """Serves after the attempts."""

    def start(self) -> None:
        """See DomIo."""
        print("HOSTILE " + json.dumps(attempts(self.host)), flush=True)
        super().start()


if __name__ == "__main__":
    honest.DomIo = HostileDomIo  # type: ignore[misc]  # the test's purpose
    honest.main()
