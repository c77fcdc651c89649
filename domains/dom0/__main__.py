"""`domicile-dom0`: the control domain: toolstack, xenstored, consoled."""

from __future__ import annotations

import socket

import bus.loading  # noqa: F401  # first
from bus import privileges
from bus.abi import sched, xen
from bus.addresses import DomId
from bus.log import Logger
from bus.messages.warden import TO_DOM0
from bus.packets import PacketLink
from bus.process import begin
from domains.dom0.toolstack.disks import Disks
from domains.dom0.toolstack.manager import Manager
from domains.dom0.toolstack.server import ToolstackServer, console_directory
from domains.dom0.toolstack.traces import Traces
from domains.dom0.xc import ControlInterface
from domains.dom0.xenstore_service import XenstoreService
from domains.native.domain import NativeDomain
from domains.native.reactor import Reactor


def main() -> None:
    """Entry point of the process."""
    start = begin(privileges.Limits(open_files=8192, oom_score=-400))
    reactor = Reactor()
    host = NativeDomain(start, reactor)
    traces = Traces(host)
    while host.memory is None:
        reactor.once(20.0)
        if not host.memory and reactor.stopping:
            return
    xc = ControlInterface(host)
    store = XenstoreService(host, exists=lambda domid: domid == 0 or xc.domain_info(DomId(domid)) is not None)
    for path, value in (("domid", "0"), ("name", "Domain-0")):
        store.write(f"/local/domain/0/{path}", value)
    store.mkdir("/tool")
    store.mkdir("/vm")
    store.attach_socket(socket.socket(fileno=start.fds["xenstored"]))
    warden = PacketLink(socket.socket(fileno=start.fds["warden"]), TO_DOM0)
    disks = Disks(host, store, xc, warden, Logger("dom0", part="disks").info)
    manager = Manager(host, store, xc, disks, console_directory(start.settings["consoles"]))
    info = {"isolated": start.own_uid, "doorbells": bool(start.settings.get("doorbells", True))}
    server = ToolstackServer(host, manager, socket.socket(fileno=start.fds["control"]), info, traces)
    reactor.run()
    server.close()
    request = sched.SCHED_SHUTDOWN.pack(sched.sched_shutdown(sched.SHUTDOWN_poweroff))
    host.hypercall(xen.HYPERVISOR_sched_op, sched.SCHEDOP_shutdown, request)


if __name__ == "__main__":
    main()
