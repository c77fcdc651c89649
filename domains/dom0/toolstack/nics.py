"""Network interfaces: NetIO that serves and bridges them, and the nodes by which frontends find their back ends, as libxl writes them.

NetIO is started with the first interface (or the first port for a program outside) and restarted in place like DomIO.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from bus.addresses import DomId
from bus.messages.envelope import BadMessage, Message
from bus.messages.net import FROM_NETIO, MAX_PORTS, NetHello, NetHost, NetLink, NetPort, NetPortGone
from bus.packets import LinkClosed, LinkFull, PacketLink, pair
from domains.dom0.toolstack.disks import number_in
from domains.dom0.toolstack.driver_domain import READY_TIMEOUT_S, DriverDomain, DriverDomainBusy
from domains.dom0.xc import ControlInterface
from domains.dom0.xenstore_service import XenstoreService
from domains.native.domain import NativeDomain
from drivers.net.helper import HelperHost

NETIO_PAGES: Final = 2048
"""NetIO's own memory (8 MiB): its stage for copies, its xenstore ring."""
ROLE: Final = 3
"""ssidref of NetIO (hypervisor.core.domains.ROLES)."""
FIRST_DOMID: Final = 0x3F00
"""NetIO's domid, and that of one that takes the place of one that was destroyed: its link is deposited before it is created."""
MAX_NICS: Final = 16
"""Of a guest."""
DETACH_S: Final = 10.0
MTU: Final = 1500
BURST: Final = 64
_MAC: Final = re.compile(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}")
_BRIDGE: Final = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_RATE: Final = re.compile(r"([0-9]{1,12})([GMK]?)([Bb])/s(?:@([0-9]{1,9})(ms|us|s)?)?")
_UNITS: Final = {"": 1, "K": 1000, "M": 1000_000, "G": 1000_000_000}
_TIMES: Final = {"us": 1, "ms": 1000, "s": 1000_000, None: 1000_000}
DEFAULT_INTERVAL_US: Final = 50_000
Deposit = Callable[[str, list[str], list[int], dict[str, Any]], None]


class NicError(Exception):
    """Told to the user in one line."""


@dataclass(slots=True)
class Nic:
    """One interface of a guest."""

    domid: DomId
    devid: int
    mac: str
    bridge: str
    backend: DomId

    @property
    def back(self) -> str:
        """The back end's directory."""
        return f"/local/domain/{self.backend}/backend/vif/{self.domid}/{self.devid}"

    @property
    def front(self) -> str:
        """The frontend's directory."""
        return f"/local/domain/{self.domid}/device/vif/{self.devid}"


def random_mac() -> str:
    """As libxl makes one: Xen's 00:16:3e and three bytes of chance."""
    tail = os.urandom(3)
    return f"00:16:3e:{tail[0] & 0x7F:02x}:{tail[1]:02x}:{tail[2]:02x}"


def rate_of(text: str) -> tuple[int, int]:
    """`rate=` of xl-network-configuration as (bytes in an interval, microseconds of it). NicError."""
    found = _RATE.fullmatch(text)
    if found is None:
        raise NicError(f"rate {text!r}: such as 10Mb/s, 250KB/s or 1MB/s@20ms")
    amount, unit, kind, interval, scale = found.groups()
    per_second = int(amount) * _UNITS[unit] // (8 if kind == "b" else 1)
    micros = int(interval) * _TIMES[scale] if interval else DEFAULT_INTERVAL_US
    each = per_second * micros // 1000_000
    if not 0 < each < 1 << 32 or not 0 < micros < 1 << 32:
        raise NicError(
            f"rate {text!r}: {each} bytes every {micros} microseconds: it must be 1 to 2^32 of both"
        )
    return each, micros


class Nics:
    """All interfaces of the machine, and NetIO."""

    def __init__(
        self,
        host: NativeDomain,
        store: XenstoreService,
        xc: ControlInterface,
        deposit: Deposit,
        log: Callable[[str], None],
    ) -> None:
        self._host: Final = host
        self._store: Final = store
        self._xc: Final = xc
        self._deposit: Final = deposit
        self._log: Final = log
        self.driver: Final = DriverDomain(host, store, xc, log, name="NetIO", role=ROLE, pages=NETIO_PAGES)
        self.driver.give_up = self.destroy_netio
        self.nics: Final[list[Nic]] = []
        self.find_domain: Callable[[str], DomId | None] = lambda name: None
        """A running domain by its name or number."""
        self._link: PacketLink | None = None
        self._heard = False
        self._ports: Final[dict[int, tuple[NetPort, socket.socket]]] = {}
        """Ports of programs outside, and NetIO's end of their sockets."""
        self._links: Final[dict[tuple[str, str], NetLink]] = {}
        self._hosts: Final[dict[str, NetHost]] = {}
        self._started = 0
        self._serial = 0

    def check(self) -> None:
        """VIRQ_DOM_EXC."""
        self.driver.check()

    # ------------------------------------------------------------------ NetIO

    def _netio(self) -> DomId:
        """NetIO's domain, started where there is none."""
        if self.driver.domid is not None:
            return self.driver.domid
        try:
            with self.driver.being_started():
                return self._start_netio()
        except DriverDomainBusy as error:
            raise NicError(str(error)) from None

    def _start_netio(self) -> DomId:
        domid = DomId(FIRST_DOMID + self._started % 0x100)
        self._started += 1
        ours, theirs = pair()
        try:
            self._deposit(f"d{domid}", ["control"], [theirs.fileno()], {})
            self._heard = False
            self._link = PacketLink(ours, FROM_NETIO)
            self._host.reactor.reader(ours.fileno(), self._receive)
            return self.driver.start(domid)
        except BaseException:
            self._drop_link()
            raise
        finally:
            theirs.close()

    def _drop_link(self) -> None:
        if self._link is not None:
            self._host.reactor.forget(self._link.fileno())
            self._link.close()
            self._link = None

    def destroy_netio(self) -> None:
        """NetIO goes for good: frontends find their back ends Closed, and ports end. NicError if there is none."""
        domid = self.driver.domid
        if domid is None:
            raise NicError("there is no NetIO: it comes with the first network interface")
        mine = [nic for nic in self.nics if nic.backend == domid]
        for nic in mine:
            self.nics.remove(nic)
        self._drop_link()
        for _, sock in self._ports.values():
            sock.close()
        self._ports.clear()
        self.driver.destroy()
        self._deposit(f"d{domid}", [], [], {})
        for nic in mine:
            self._store.write(f"{nic.back}/online", "0")
            self._store.write(f"{nic.back}/state", "6")

    def _receive(self) -> None:
        if self._link is None:
            return

        def nonsense(error: BadMessage) -> None:
            self._log(f"NetIO sent nonsense: {error}")

        for message, _ in self._link.burst(BURST, nonsense, self._drop_link):
            if isinstance(message, NetHello):
                self._heard = True
                for told in (*self._links.values(), *self._hosts.values()):
                    self._send(told)
                for port, sock in self._ports.values():
                    self._send(port, sock)
            elif isinstance(message, NetPortGone) and message.port in self._ports:
                self._ports.pop(message.port)[1].close()

    def _send(self, message: Message, sock: socket.socket | None = None) -> None:
        if self._link is None or not self._heard:
            return  # it is told when it says hello
        try:
            self._link.send(message, [sock.fileno()] if sock is not None else [])
        except (LinkClosed, LinkFull) as error:
            self._log(f"NetIO does not hear: {error}")

    # ------------------------------------------------------------------ programs outside

    def open_port(self, bridge: str, *, mirror: bool = False) -> tuple[int, int]:
        """A port on a bridge for a program: its number, and its socket (the caller's): one Ethernet frame a packet. NicError."""
        self._check_bridge(bridge)
        if len(self._ports) >= MAX_PORTS:
            raise NicError(f"there are {MAX_PORTS} ports already: close one")
        self._netio()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._serial += 1
        port = NetPort(port=self._serial, bridge=bridge, mirror=mirror)
        self._ports[self._serial] = (port, theirs)
        self._send(port, theirs)
        return self._serial, ours.detach()

    def set_link(self, bridge: str, values: dict[str, Any]) -> None:
        """What happens on the way from a bridge to its ports (`bus.messages.net.NetLink`). NicError."""
        self._check_bridge(bridge)
        try:
            link = NetLink(**{**values, "bridge": bridge})
        except (ValidationError, TypeError) as error:
            first = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else None
            where = ".".join(str(part) for part in first["loc"]) if first else "link"
            raise NicError(f"link of {bridge}: {where}: {first['msg'] if first else error}") from None
        if len(self._links) >= MAX_PORTS and (bridge, link.port) not in self._links:
            raise NicError(f"there are {MAX_PORTS} links with faults already")
        self._links[bridge, link.port] = link
        self._netio()
        self._send(link)

    def set_host(self, bridge: str, address: str, *, dhcp: bool = True) -> None:
        """A helper host on a bridge, which answers ARP and ping, and gives out addresses by DHCP; no address: it goes. NicError."""
        self._check_bridge(bridge)
        if not address:
            if self._hosts.pop(bridge, None) is None:
                raise NicError(f"bridge {bridge} has no host")
            self._send(NetHost(bridge=bridge, address=""))
            return
        try:
            HelperHost(address, dhcp=dhcp)
            host = NetHost(bridge=bridge, address=address, dhcp=dhcp)
        except ValueError as error:
            raise NicError(f"host of {bridge}: {error}"[:200]) from None
        if len(self._hosts) >= MAX_PORTS and bridge not in self._hosts:
            raise NicError(f"there are {MAX_PORTS} hosts already")
        self._hosts[bridge] = host
        self._netio()
        self._send(host)

    def _check_bridge(self, bridge: Any) -> str:
        if not isinstance(bridge, str) or not _BRIDGE.fullmatch(bridge):
            raise NicError(f"bridge {bridge!r}: a name of 1 to 15 letters, digits, '_', '.', '-'")
        return bridge

    # ------------------------------------------------------------------ attaching

    def attach(self, domid: DomId, config: dict[str, Any], kind: str) -> Nic:
        """Give a guest (of type pv, pvh or hvm) an interface: `config` as toolstack.xlcfg.devices makes it; a MAC address and a number
        that it lacks are put into it. NicError, HypercallError."""
        where = f"vif of domain {domid}"
        if config.get("type") == "ioemu" or config.get("model"):
            mend = "take type=vif" if kind == "hvm" else "leave type= and model= out"
            raise NicError(
                f"{where}: there is no emulated network card: {mend} (the guest needs its PV driver)"
            )
        mine = [nic.devid for nic in self.nics if nic.domid == domid]
        if len(mine) >= MAX_NICS:
            raise NicError(f"{where}: it has {MAX_NICS} already")
        devid = config.setdefault("devid", next(n for n in range(MAX_NICS + 1) if n not in mine))
        if not isinstance(devid, int) or not 0 <= devid <= 255:
            raise NicError(f"{where}: devid {devid!r}: a number from 0 to 255")
        if devid in mine:
            raise NicError(f"domain {domid} has a vif {devid} already")
        mac = config.setdefault("mac", random_mac())
        if not isinstance(mac, str) or not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1:
            raise NicError(f"{where}: mac {mac!r}: six pairs of hexadecimal digits, no group address")
        bridge = self._check_bridge(config.get("bridge") or "xenbr0")
        rate = rate_of(str(config["rate"])) if config.get("rate") else None
        backend = self._backend(domid, str(config.get("backend") or ""))
        nic = Nic(domid, devid, mac, bridge, backend)
        self.nics.append(nic)
        try:
            self._write_nodes(nic, config, rate)
        except BaseException:
            self.nics.remove(nic)
            raise
        return nic

    def _backend(self, domid: DomId, name: str) -> DomId:
        if name in ("", "NetIO"):
            return self._netio()
        found = self.find_domain(name)
        if found is None:
            raise NicError(f"vif: there is no domain {name!r} to serve it (backend=)")
        if found in (0, domid):
            raise NicError(f"vif: domain {name!r} cannot serve it (backend=): it has no network back end")
        return found

    def _write_nodes(self, nic: Nic, config: dict[str, Any], rate: tuple[int, int] | None) -> None:
        """Both ends' directories, as libxl writes them (docs/misc/xenstore-paths). `trusted` is the back end's last."""
        store, domid, backend = self._store, nic.domid, nic.backend
        store.remove(nic.back)
        store.remove(nic.front)
        store.mkdir(nic.back)
        store.permit(nic.back, f"n{backend}", f"r{domid}")
        store.mkdir(nic.front)
        store.permit(nic.front, f"n{domid}", f"r{backend}")
        mtu = config.get("mtu", MTU)
        trusted = "1" if config.get("trusted", True) else "0"
        nodes = [
            ("frontend", nic.front),
            ("frontend-id", str(domid)),
            ("online", "1"),
            ("state", "1"),
            ("script", "/etc/xen/scripts/vif-bridge"),
            ("mac", nic.mac),
            *([("ip", str(config["ip"]))] if config.get("ip") else []),
            *([("mtu", str(mtu))] if mtu != MTU else []),
            *([("rate", f"{rate[0]},{rate[1]}")] if rate is not None else []),
            ("bridge", nic.bridge),
            ("handle", str(nic.devid)),
            ("type", "vif"),
            ("trusted", trusted),
        ]
        for path, value in nodes:
            store.write(f"{nic.back}/{path}", value)
        for path, value in (
            ("backend", nic.back),
            ("backend-id", str(backend)),
            ("state", "1"),
            ("handle", str(nic.devid)),
            *([("mtu", str(mtu))] if mtu != MTU else []),
            ("mac", nic.mac),
            ("trusted", trusted),
        ):
            store.write(f"{nic.front}/{path}", value)

    def wait_offered(self, domid: DomId) -> None:
        """Wait, as libxl does before it starts a guest, until the back ends of its interfaces offer them (InitWait or beyond). One that
        does not come up in time is logged: the guest sees it when it does."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        for nic in [nic for nic in self.nics if nic.domid == domid]:
            while self._store.read(f"{nic.back}/state") in (None, "1"):
                if time.monotonic() > deadline:
                    self._log(f"vif {nic.devid} of domain {domid}: its back end does not come up")
                    return
                self._host.reactor.once(0.05)

    # ------------------------------------------------------------------ looking, and taking away

    def list(self, domid: DomId) -> list[dict[str, Any]]:
        """What `xl network-list` shows. A frontend's numbers are its own words."""
        rows = []
        read = self._store.read
        for nic in self.nics:
            if nic.domid != domid:
                continue
            channel = read(f"{nic.front}/event-channel") or read(f"{nic.front}/event-channel-tx")
            rows.append(
                {
                    "devid": nic.devid,
                    "backend_id": int(nic.backend),
                    "mac": nic.mac,
                    "bridge": nic.bridge,
                    "handle": nic.devid,
                    "state": number_in(read(f"{nic.back}/state"), 0),
                    "event_channel": number_in(channel, -1),
                    "tx_ring_ref": number_in(read(f"{nic.front}/tx-ring-ref"), -1),
                    "rx_ring_ref": number_in(read(f"{nic.front}/rx-ring-ref"), -1),
                    "path": nic.back,
                }
            )
        return rows

    def detach(self, domid: DomId, which: str, *, force: bool = False) -> None:
        """Take an interface away, named by its number or MAC address. NicError if the guest does not let go."""
        for nic in list(self.nics):
            if nic.domid == domid and which.lower() in (str(nic.devid), nic.mac):
                self._detach(nic, force=force)
                return
        raise NicError(f"domain {domid} has no vif {which}")

    def _detach(self, nic: Nic, *, force: bool) -> None:
        store = self._store
        state = store.read(f"{nic.back}/state")
        if not force and state is not None:
            store.write(f"{nic.back}/online", "0")
            store.write(f"{nic.back}/state", "5")
            deadline = time.monotonic() + DETACH_S
            while store.read(f"{nic.back}/state") not in (None, "6"):
                if time.monotonic() > deadline:
                    raise NicError(
                        f"vif {nic.devid}: the guest does not let go of it (--force takes it away)"
                    )
                self._host.reactor.once(0.1)
        if nic not in self.nics:
            return  # somebody else took it away while it was waited for
        self.nics.remove(nic)
        store.remove(nic.back)
        store.remove(nic.front)

    def domain_died(self, domid: DomId) -> None:
        """Its interfaces go with it, and with a driver domain those that it served keep their nodes (a new one is for the user to make)."""
        for nic in [nic for nic in self.nics if nic.domid == domid]:
            self._detach(nic, force=True)
