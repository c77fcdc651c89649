"""The toolstack's socket: takes requests of the command, answers, and sends notices."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from bus.abi import sysctl, version
from bus.abi.arch_x86_64 import HYPERVISOR_VIRT_START
from bus.addresses import DomId
from bus.link import HypervisorGone
from bus.messages.control import MAX_CONSOLE_CHUNK, TO_TOOLSTACK, DomainConfig, Notice, Request, Response
from bus.messages.envelope import BadMessage, Message
from bus.packets import LinkClosed, LinkFull, PacketLink, close_all
from domains.dom0.consoled import Terminal
from domains.dom0.toolstack.adjust import Adjustments, as_number
from domains.dom0.toolstack.disks import DiskError
from domains.dom0.toolstack.guest import ToolstackError
from domains.dom0.toolstack.hardware import HardwareError
from domains.dom0.toolstack.insight import registers, stats, stats_of
from domains.dom0.toolstack.manager import Manager
from domains.dom0.toolstack.models import DeviceModel, ModelError
from domains.dom0.toolstack.nics import NicError
from domains.dom0.toolstack.top import top_view
from domains.dom0.toolstack.traces import Traces
from domains.dom0.xenstore_service import XenstoreError
from domains.native.domain import HypercallError, NativeDomain

MAX_CLIENTS: Final = 64
MAX_BACKLOG: Final = 64 << 20
"""Bytes that may wait for a client that does not read; then it is dropped."""
BURST: Final = 16
MAX_KEYS: Final = 64
LOG_SHOWN: Final = 56 << 10
"""Bytes of the hypervisor's log in one answer: the latest."""
VIRT_CAPS: Final = (
    ("pv", sysctl.XEN_SYSCTL_PHYSCAP_pv),
    ("hvm", sysctl.XEN_SYSCTL_PHYSCAP_hvm),
    ("hvm_directio", sysctl.XEN_SYSCTL_PHYSCAP_directio),
    ("hap", sysctl.XEN_SYSCTL_PHYSCAP_hap),
    ("shadow", sysctl.XEN_SYSCTL_PHYSCAP_shadow),
    ("gnttab-v1", sysctl.XEN_SYSCTL_PHYSCAP_gnttab_v1),
    ("gnttab-v2", sysctl.XEN_SYSCTL_PHYSCAP_gnttab_v2),
)
"""Names as `xl info` prints them. PV guests get no devices of their own here, so "pv_directio" is not among them."""
Handler = Callable[["Client", dict[str, Any], list[int]], Any]


class Answer(NamedTuple):
    """A result with descriptors, which are closed when they are sent."""

    result: Any
    descriptors: list[int]


class Client:
    """One connection of the command."""

    def __init__(self, server: ToolstackServer, sock: socket.socket, number: int) -> None:
        self._server = server
        self.number = number
        self.link = PacketLink(sock, TO_TOOLSTACK)
        self._waiting: list[tuple[Message, list[int]]] = []
        self._size = 0
        self.attached: list[tuple[Terminal, Callable[[bytes], None]]] = []
        self.follows = False

    def send(self, message: Message, descriptors: list[int] | None = None) -> None:
        """Send, or queue for a client that reads slowly. Descriptors are taken over."""
        self._waiting.append((message, descriptors or []))
        self._size += 1000 + len(str(getattr(message, "body", "")))
        self.flush()

    def flush(self) -> None:
        """Send what waits."""
        while self._waiting:
            message, descriptors = self._waiting[0]
            try:
                self.link.send(message, descriptors)
            except BadMessage as error:  # too much for one message; part of it may come from guests
                close_all(descriptors)
                self._waiting[0:1] = _instead_of(message, error)
                continue
            except LinkFull:
                if self._size > MAX_BACKLOG:
                    self._server.drop(self)
                else:
                    self._server.host.reactor.writer(self.link.fileno(), self.flush)
                return
            except (LinkClosed, OSError):
                self._server.drop(self)
                self.close()  # also if it was dropped while its request was served
                return
            close_all(self._waiting.pop(0)[1])
        self._size = 0
        self._server.host.reactor.writer(self.link.fileno(), None)

    def close(self) -> None:
        """Close the connection, and what waits for it."""
        for _, descriptors in self._waiting:
            close_all(descriptors)
        self._waiting.clear()
        self.link.close()

    def attach(self, console: Terminal, *, replay: bool) -> None:
        """Send the console's output as notices."""

        def listener(data: bytes) -> None:
            for start in range(0, len(data), MAX_CONSOLE_CHUNK):
                chunk = data[start : start + MAX_CONSOLE_CHUNK]
                self.send(Notice(what="console", body={"name": console.name, "data": chunk}))

        if replay and console.scrollback:
            listener(bytes(console.scrollback))
        console.attach(listener)
        self.attached.append((console, listener))


def _instead_of(message: Message, error: BadMessage) -> list[tuple[Message, list[int]]]:
    """What is sent in place of a message that cannot be: an error, or a notice with no details."""
    if isinstance(message, Response) and not message.error:
        return [(Response(id=message.id, ok=False, error=f"the answer is too long: {error}"[:400]), [])]
    if isinstance(message, Notice) and message.what == "ended":
        short = {name: message.body[name] for name in ("domid", "name", "reason")}
        body = {**short, "details": str(message.body.get("details", ""))[-1000:]}
        if body != message.body:
            return [(Notice(what="ended", body=body), [])]
    return []


class ToolstackServer:
    """Verbs by name; each handler gives the result or raises ToolstackError."""

    def __init__(
        self,
        host: NativeDomain,
        manager: Manager,
        listener: socket.socket,
        info: dict[str, Any],
        traces: Traces,
    ) -> None:
        self.host = host
        self.manager = manager
        self.traces = traces
        self._serial = 0
        self._listener = listener
        self._clients: list[Client] = []
        self._info = info
        listener.setblocking(False)
        host.reactor.reader(listener.fileno(), self._accept)
        manager.on_end.append(self._ended)
        adjust = Adjustments(manager)
        self._verbs: dict[str, Handler] = {
            "create": self._create,
            "list": lambda client, args, fds: manager.list_domains(),
            "vcpu-list": self._vcpu_list,
            "console": self._console,
            "type": self._type,
            "screenshot": self._screenshot,
            "send-key": self._send_key,
            "vnc": self._vnc,
            "tty": lambda client, args, fds: self._line(args).tty,
            "shutdown": lambda client, args, fds: manager.shutdown(
                args["domain"], args.get("how", "poweroff"), fallback=bool(args.get("fallback"))
            ),
            "destroy": self._destroy,
            "pause": lambda client, args, fds: manager.pause(args["domain"]),
            "unpause": lambda client, args, fds: manager.unpause(args["domain"]),
            "domid": lambda client, args, fds: int(manager.find(args["domain"]).domid),
            "domname": self._domname,
            "dmesg": lambda client, args, fds: manager.xc.read_console(clear=bool(args.get("clear")))[
                -LOG_SHOWN:
            ],
            "check": self._check,
            "info": self._machine_info,
            "uptime": self._uptime,
            "sched-credit2": self._scheduler,
            "follow": self._follow,
            "xenstored-restart": lambda client, args, fds: manager.store.restart(),
            "block-attach": self._block_attach,
            "block-detach": self._block_detach,
            "block-list": lambda client, args, fds: manager.disks.list(manager.find(args["domain"]).domid),
            "network-attach": self._network_attach,
            "network-detach": lambda client, args, fds: manager.nics.detach(
                manager.find(args["domain"]).domid, str(args["vif"]), force=bool(args.get("force"))
            ),
            "network-list": lambda client, args, fds: manager.nics.list(manager.find(args["domain"]).domid),
            "network-port": self._network_port,
            "network-link": lambda client, args, fds: manager.nics.set_link(
                args["bridge"], {name: value for name, value in args.items() if name != "bridge"}
            ),
            "network-host": lambda client, args, fds: manager.nics.set_host(
                args["bridge"], str(args.get("address", "")), dhcp=bool(args.get("dhcp", True))
            ),
            "domio": self._domio,
            "device-plug": self._device_plug,
            "device-unplug": lambda client, args, fds: manager.hardware.unplug(int(args["bdf"])),
            "pci-list": self._pci_list,
            "iommu": self._iommu,
            "stats": lambda client, args, fds: stats(manager, args["domain"], fresh=bool(args.get("fresh"))),
            "registers": lambda client, args, fds: registers(manager, args["domain"]),
            "top": lambda client, args, fds: top_view(manager, traces.disks(), traces.nets()),
            "vcpu-pin": self._vcpu_pin,
            "mem-set": lambda client, args, fds: adjust.set_memory(args["domain"], as_number(args, "kib")),
            "mem-max": lambda client, args, fds: adjust.limit_memory(args["domain"], as_number(args, "kib")),
            "vcpu-set": lambda client, args, fds: adjust.set_vcpus(args["domain"], as_number(args, "count")),
            "sysrq": lambda client, args, fds: adjust.sysrq(args["domain"], str(args["key"])),
            "trigger": lambda client, args, fds: adjust.trigger(
                args["domain"], str(args["what"]), as_number(args, "vcpu", 0)
            ),
            "rename": lambda client, args, fds: adjust.rename(args["domain"], str(args["name"])),
            "debug-keys": self._debug_keys,
            "trace": self._trace,
            "tracing": lambda client, args, fds: traces.watched,
            "down": self._down,
        }

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        if len(self._clients) >= MAX_CLIENTS:
            sock.close()
            return
        self._serial += 1
        client = Client(self, sock, self._serial)
        self._clients.append(client)
        self.host.reactor.reader(sock.fileno(), lambda: self._serve(client))

    def drop(self, client: Client) -> None:
        """Forget a client."""
        if client in self._clients:
            self._clients.remove(client)
            for console, listener in client.attached:
                console.detach(listener)
            self.traces.watch(client.number, False)
            self.host.reactor.forget(client.link.fileno())
            client.close()

    def _serve(self, client: Client) -> None:
        def nonsense(error: BadMessage) -> None:
            client.send(Response(id=0, ok=False, error=f"not understood: {error}"))

        for request, fds in client.link.burst(BURST, nonsense, lambda: self.drop(client)):
            assert isinstance(request, Request)
            self._answer(client, request, fds)
            if client not in self._clients:
                return

    def _answer(self, client: Client, request: Request, fds: list[int]) -> None:
        handler = self._verbs.get(request.verb)
        files: list[int] = []
        taken = request.verb == "create"
        try:
            if handler is None:
                raise ToolstackError(f"verb {request.verb!r} is not known to this machine")
            result = handler(client, request.args, fds)
            if isinstance(result, Answer):
                result, files = result
            response = Response(id=request.id, ok=True, result=result)
        except HypercallError as error:
            response = Response(
                id=request.id, ok=False, error=f"{request.verb}: the hypervisor says: {error}"[:4000]
            )
        except (ToolstackError, DiskError, NicError, HardwareError, ModelError, XenstoreError) as error:
            response = Response(id=request.id, ok=False, error=str(error)[:4000])
        except KeyError as error:
            response = Response(id=request.id, ok=False, error=f"{request.verb}: argument {error} is missing")
        except HypervisorGone:
            raise
        except Exception as error:  # arguments, or a guest's nodes, of a kind that nobody thought of: this request fails, no more
            print("".join(traceback.format_exception(error))[-4000:], flush=True)
            response = Response(id=request.id, ok=False, error=f"{request.verb}: {error!r}"[:400])
        finally:
            if not taken:
                close_all(fds)
        client.send(response, files)

    # ------------------------------------------------------------------ verbs

    def _create(self, client: Client, args: dict[str, Any], fds: list[int]) -> int:
        try:
            config = DomainConfig.model_validate(args["config"])
        except ValidationError as error:
            close_all(fds)
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ToolstackError(f"configuration: {where}: {first['msg']}") from None
        domid = self.manager.create(config, fds)
        if args.get("attach"):
            client.follows = True
            client.attach(self.manager.guests[domid].terminal, replay=True)
        return int(domid)

    def _console(self, client: Client, args: dict[str, Any], fds: list[int]) -> str:
        line = self._line(args)
        client.attach(line, replay=bool(args.get("replay", True)))
        return line.tty

    def _model(self, args: dict[str, Any]) -> DeviceModel:
        model = self.manager.find(args["domain"]).model
        if model is None:
            raise ToolstackError(
                f"domain {args['domain']} has no screen and no keyboard: only full HVM guests have"
            )
        return model

    def _screenshot(self, client: Client, args: dict[str, Any], fds: list[int]) -> Answer:
        """Width and height; the pixels, three bytes each, are in a memfd that comes along."""
        width, height, fd = self._model(args).screen()
        return Answer({"width": width, "height": height}, [fd])

    def _vnc(self, client: Client, args: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Where the VNC server of a domain listens."""
        found = self._model(args).vnc
        if found is None:
            raise ToolstackError(f"domain {args['domain']} has no VNC server: give it vnc = 1")
        return {"address": found[0], "port": found[1]}

    def _send_key(self, client: Client, args: dict[str, Any], fds: list[int]) -> None:
        keys = args["keys"]
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ToolstackError("send-key: keys must be a list of names")
        self._model(args).keys(keys)

    def _line(self, args: dict[str, Any]) -> Terminal:
        """`domain`, and `type`: 'pv', 'serial', or none for its first console."""
        guest, kind = self.manager.find(args["domain"]), args.get("type") or ""
        if kind == "pv":
            return guest.console
        if kind == "serial" and (guest.serial is None or not guest.config.serial):
            raise ToolstackError(
                f"domain {args['domain']} has no serial line: only full HVM guests have, and not all"
            )
        if kind not in ("", "serial"):
            raise ToolstackError(f"console type {kind!r}: there are pv and serial")
        return guest.terminal

    def _type(self, client: Client, args: dict[str, Any], fds: list[int]) -> int:
        data = args["data"]
        if not isinstance(data, bytes):
            raise ToolstackError("type: data must be bytes")
        return self._line(args).type(data)

    def _domname(self, client: Client, args: dict[str, Any], fds: list[int]) -> str:
        if args["domain"] in (0, "0"):
            return "Domain-0"
        return self.manager.find(args["domain"]).config.name

    def _vcpu_list(self, client: Client, args: dict[str, Any], fds: list[int]) -> list[dict[str, Any]]:
        rows = []
        cpus = self.manager.xc.physinfo().nr_cpus
        for info in self.manager.xc.domain_list():
            if args.get("domain") and info.domain != self.manager.find(args["domain"]).domid:
                continue
            for number in range(info.max_vcpu_id + 1 if info.max_vcpu_id != 0xFFFFFFFF else 0):
                vcpu = self.manager.xc.vcpu_info(DomId(info.domain), number)
                hard, soft = self.manager.xc.affinity(DomId(info.domain), number)
                rows.append(
                    {
                        "name": self.manager.name_of(info.domain),
                        "domid": info.domain,
                        "vcpu": number,
                        "cpu": vcpu.cpu,
                        "online": bool(vcpu.online),
                        "state": f"{'r' if vcpu.running else '-'}{'b' if vcpu.blocked else '-'}-",
                        "time_s": vcpu.cpu_time / 1e9,
                        "hard": sorted(hard),
                        "soft": sorted(soft),
                        "cpus": cpus,
                    }
                )
        return rows

    def _vcpu_pin(self, client: Client, args: dict[str, Any], fds: list[int]) -> None:
        """`vcpu` of `domain` (or all, without it): `hard` and `soft`, lists of CPUs; what is not there stays."""
        guest = self.manager.find(args["domain"])
        sets: list[set[int] | None] = []
        for name in ("hard", "soft"):
            cpus = args.get(name)
            if cpus is not None and not (
                isinstance(cpus, list) and all(isinstance(cpu, int) for cpu in cpus)
            ):
                raise ToolstackError(f"vcpu-pin: {name} must be a list of CPUs")
            sets.append(set(cpus) if cpus is not None else None)
        vcpu = args.get("vcpu")
        count = guest.config.maxvcpus or guest.config.vcpus
        for number in range(count) if vcpu is None else [int(vcpu)]:
            self.manager.pin(guest.domid, number, *sets)

    def _machine_info(self, client: Client, args: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        physical = self.manager.xc.physinfo()
        capabilities = physical.capabilities
        return {
            **self._info,
            "nr_cpus": physical.nr_cpus,
            "max_cpu_id": physical.max_cpu_id,
            "nr_nodes": physical.nr_nodes,
            "cores_per_socket": physical.cores_per_socket,
            "threads_per_core": physical.threads_per_core,
            "virt_caps": [name for name, bit in VIRT_CAPS if capabilities & bit],
            "cpu_mhz": physical.cpu_khz / 1000,
            "total_memory": physical.total_pages >> 8,
            "free_memory": physical.free_pages >> 8,
            "outstanding_claims": physical.outstanding_pages >> 8,
            "xen_major": version.XEN_MAJOR,
            "xen_minor": version.XEN_MINOR,
            "xen_scheduler": "credit2",
            "xen_extra": version.XEN_EXTRAVERSION.decode(),
            "xen_caps": version.XEN_CAPABILITIES.decode().strip(),
            "virt_start": HYPERVISOR_VIRT_START,
        }

    def _check(self, client: Client, args: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Debug key I: the hypervisor checks its own records. Their problems in words, and counters."""
        self.manager.xc.debug_keys("I")
        mark = "(XEN) invariants: "
        lines = self.manager.xc.read_console().decode("utf-8", "replace").splitlines()
        said = [line.removeprefix(mark) for line in lines if line.startswith(mark)]
        count, _, counters = said[-1].partition(" problems, ")
        number = min(int(count), len(said) - 1)
        return {"problems": said[len(said) - 1 - number : -1], "counters": json.loads(counters)}

    def _debug_keys(self, client: Client, args: dict[str, Any], fds: list[int]) -> None:
        """What they print is in the log then."""
        keys = str(args["keys"])
        if not 1 <= len(keys) <= MAX_KEYS or not keys.isascii():
            raise ToolstackError(f"debug-keys {keys!r}: 1 to {MAX_KEYS} ASCII characters, such as h")
        self.manager.xc.debug_keys(keys)

    def _uptime(self, client: Client, args: dict[str, Any], fds: list[int]) -> list[dict[str, Any]]:
        now = time.monotonic()
        rows = [{"name": "Domain-0", "domid": 0, "seconds": now - self.manager.started}]
        rows += [
            {"name": guest.config.name, "domid": int(guest.domid), "seconds": now - guest.started}
            for guest in self.manager.guests.values()
        ]
        return rows

    def _scheduler(self, client: Client, args: dict[str, Any], fds: list[int]) -> list[dict[str, Any]]:
        domains = [DomId(info.domain) for info in self.manager.xc.domain_list()]
        if args.get("domain") is not None:
            domains = [self.manager.find(args["domain"]).domid]
            if args.get("weight") is not None or args.get("cap") is not None:
                self.manager.xc.scheduler(domains[0], args.get("weight"), args.get("cap"))
        rows = []
        for domid in domains:
            weight, cap = self.manager.xc.scheduler(domid)
            rows.append(
                {"name": self.manager.name_of(domid), "domid": int(domid), "weight": weight, "cap": cap}
            )
        return rows

    def _block_attach(self, client: Client, args: dict[str, Any], fds: list[int]) -> int:
        disk = args["disk"]
        if not isinstance(disk, dict):
            raise ToolstackError("block-attach: disk must be a map")
        try:
            return self.manager.disks.attach(
                self.manager.find(args["domain"]).domid, disk, fds[0] if fds else None
            ).number
        except DiskError as error:
            raise ToolstackError(str(error)) from None

    def _block_detach(self, client: Client, args: dict[str, Any], fds: list[int]) -> None:
        try:
            domid = self.manager.find(args["domain"]).domid
            self.manager.disks.detach(domid, str(args["vdev"]), force=bool(args.get("force")))
        except (DiskError, ValueError) as error:
            raise ToolstackError(str(error)) from None

    def _network_attach(self, client: Client, args: dict[str, Any], fds: list[int]) -> int:
        vif, guest = args["vif"], self.manager.find(args["domain"])
        if not isinstance(vif, dict):
            raise ToolstackError("network-attach: vif must be a map")
        return self.manager.nics.attach(guest.domid, vif, guest.config.type).devid

    def _network_port(self, client: Client, args: dict[str, Any], fds: list[int]) -> Answer:
        """A port on `bridge` for a program (`mirror`: it sees all that passes): its number; its socket comes along, and closing that ends it."""
        number, fd = self.manager.nics.open_port(args["bridge"], mirror=bool(args.get("mirror")))
        return Answer({"port": number}, [fd])

    def _domio(self, client: Client, args: dict[str, Any], fds: list[int]) -> None:
        """DomIO is to be a guest program: `path`, and its kernel file as the descriptor."""
        if len(fds) != 1:
            raise ToolstackError("domio: there must be one file, its kernel")
        try:
            self.manager.disks.use_guest(fds[0], str(args["path"])[:4096])
        except DiskError as error:
            raise ToolstackError(str(error)) from None

    def _device_plug(self, client: Client, args: dict[str, Any], fds: list[int]) -> int:
        """`kind`, `config` (format, readonly, target), perhaps `bdf`; the file is the descriptor. The PCI address."""
        config, bdf = args["config"], args.get("bdf")
        if not isinstance(config, dict) or not (bdf is None or isinstance(bdf, int)) or len(fds) != 1:
            raise ToolstackError(
                "device-plug: config must be a map, bdf a number, and there must be one file"
            )
        return self.manager.hardware.plug(str(args["kind"]), config, fds[0], bdf)

    def _pci_list(self, client: Client, args: dict[str, Any], fds: list[int]) -> list[dict[str, Any]]:
        name = args.get("domain")
        return self.manager.hardware.list(None if name is None else self.manager.find(name).domid)

    def _destroy(self, client: Client, args: dict[str, Any], fds: list[int]) -> None:
        disks, nics = self.manager.disks, self.manager.nics
        if disks.driver.called(args["domain"]):
            disks.destroy_domio()
        elif nics.driver.called(args["domain"]):
            nics.destroy_netio()
        else:
            self.manager.destroy(args["domain"])

    def _iommu(self, client: Client, args: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """`domain` (name or number), `bdf`, `iova`; with the domains' names."""
        disks, name = self.manager.disks, args.get("domain")
        domid: int | None = None
        if name in ("DomIO", str(disks.domio)) and disks.domio is not None:
            domid = disks.domio
        elif name is not None:
            domid = self.manager.find(name).domid
        try:
            view = disks.iommu(bdf=args.get("bdf"), domain=domid, iova=args.get("iova"))
        except HypercallError as error:
            words = {
                errno.ENODEV: "there is no such device, or nobody owns it",
                errno.ESRCH: f"domain {name} has no I/O page tables: it owns no device",
                errno.EINVAL: "an address to walk for needs a domain or a device",
            }
            raise ToolstackError(f"iommu: {words.get(error.errno or 0, str(error))}") from None
        names = {each["domain"] for each in (*view["devices"], *view["domains"])} - {None}
        return {**view, "names": [[number, self.manager.name_of(number)] for number in sorted(names)]}

    def _trace(self, client: Client, args: dict[str, Any], fds: list[int]) -> Answer:
        """Watch from now on: the trace pages that are not `known` yet. It ends with the connection."""
        known = args.get("known", [])
        if not isinstance(known, list) or not all(isinstance(peer, int) for peer in known):
            raise ToolstackError("trace: known must be a list of numbers")
        self.traces.watch(client.number, True)
        pages, files = self.traces.fresh(known)
        names = [[domid, self.manager.name_of(domid)] for domid in self.traces.domains()]
        return Answer({"pages": pages, "names": names}, files)

    def _follow(self, client: Client, args: dict[str, Any], fds: list[int]) -> None:
        client.follows = True

    def _down(self, client: Client, args: dict[str, Any], fds: list[int]) -> None:
        self.host.reactor.soon(self._stop)

    def _stop(self) -> None:
        self.manager.close()
        self.host.reactor.stopping = True

    def _ended(self, domid: DomId, name: str, reason: str, details: str) -> None:
        body: dict[str, Any] = {
            "domid": int(domid),
            "name": name,
            "reason": reason,
            "details": details[-20000:],
        }
        guest = self.manager.guests.get(domid)
        if guest is not None:
            body["stats"] = stats_of(guest)
        for client in list(self._clients):
            if client.follows:
                client.send(Notice(what="ended", body=body))

    def close(self) -> None:
        """Close every connection."""
        for client in list(self._clients):
            self.drop(client)
        with contextlib.suppress(OSError):
            self._listener.close()


def console_directory(path: str) -> Path:
    """Where console logs go; made if it is missing."""
    directory = Path(path)
    os.makedirs(directory, exist_ok=True)
    return directory
