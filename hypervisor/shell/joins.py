"""What joins two processes: doorbells of event channels, shared memory of a guest and its device model. Nothing of it is kept here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bus import ioreq_area
from bus.addresses import DomId
from bus.doorbell import Doorbell
from bus.packets import close_all
from hypervisor.core import effects as fx
from hypervisor.shell.peers import Peer, PeerLost


class Joins:
    """Makes both ends and hands them out."""

    def __init__(
        self,
        peers: Mapping[DomId, Peer],
        sent: Callable[[Peer], None],
        lost: Callable[[DomId, str], None],
        *,
        doorbells: bool,
    ) -> None:
        """`sent`: something waits for that peer; `lost`: it takes nothing any more. `doorbells` False: events go by messages."""
        self._peers = peers
        self._sent = sent
        self._lost = lost
        self._doorbells = doorbells
        self._joined: set[tuple[DomId, int]] = set()
        """Ports that were given doorbells, or told of their other end."""
        self.interrupts = doorbells
        """Devices' interrupts go by doorbells, too."""
        self._bells: dict[tuple[DomId, int], Doorbell] = {}
        """Those that are rung here, by domain and port."""

    def _tell(self, domain: DomId, what: str, body: dict[str, object], fds: Sequence[int] = ()) -> bool:
        peer = self._peers.get(domain)
        if peer is None:
            return False
        try:
            peer.order(0, what, body, fds)
            self._sent(peer)
        except PeerLost as lost:
            self._lost(domain, str(lost))
            return False
        return True

    def bind(self, bind: fx.Bind) -> None:
        """A doorbell each way: what one side rings the other listens to. A channel within one domain needs none, and one to a domain
        that is behind gets none: its events go by messages, which are merged, while a peer that binds and closes all the time would
        fill the other's descriptor socket. OSError: no descriptors are left."""
        if bind.left == bind.right:
            for port, other in ((bind.left_port, bind.right_port), (bind.right_port, bind.left_port)):
                if self._tell(bind.left, "loop", {"port": port, "other": other}):
                    self._joined.add((bind.left, port))
            return
        ends = [self._peers[domain] for domain in (bind.left, bind.right) if domain in self._peers]
        if not self._doorbells or any(peer.behind for peer in ends):
            return
        (to_left, left), (to_right, right) = Doorbell.pair(), Doorbell.pair()
        try:
            for domain, port, ring, listen in (
                (bind.left, bind.left_port, to_right, left),
                (bind.right, bind.right_port, to_left, right),
            ):
                if self._tell(domain, "doorbell", {"port": port}, [ring.fd, listen.fd]):
                    self._joined.add((domain, port))
        finally:
            for bell in (to_left, left, to_right, right):
                bell.close()

    def interrupt(self, domain: DomId, port: int) -> None:
        """A doorbell for a port that stands for a device's interrupt: rung here. As with `bind`, a domain that is behind gets none.
        OSError: no descriptors are left."""
        peer = self._peers.get(domain)
        if not self.interrupts or peer is None or peer.behind:
            return
        bell, listen = Doorbell.pair()
        if self._tell(domain, "doorbell", {"port": port}, [listen.fd]):
            self._joined.add((domain, port))
            self._bells[domain, port] = bell
        else:
            bell.close()
        listen.close()

    def ring(self, domain: DomId, port: int) -> bool:
        """A device's interrupt was raised. False: that port has no doorbell."""
        bell = self._bells.get((domain, port))
        if bell is None:
            return False
        bell.ring()
        return True

    def unbind(self, domain: DomId, port: int) -> None:
        """The channel is no more: the port's doorbells, if it had any, are taken away."""
        bell = self._bells.pop((domain, port), None)
        if bell is not None:
            bell.close()
        if (domain, port) in self._joined:
            self._joined.discard((domain, port))
            self._tell(domain, "doorbell_off", {"port": port})

    def model(self, join: fx.JoinModel) -> None:
        """Memory and doorbells for a guest's process and its device model, to each its own ends. OSError: no descriptors are left."""
        memory = ioreq_area.create()
        ends: list[Doorbell] = []
        try:
            guest, model = ioreq_area.bells()
            ends += [*guest, *model]
            for domain, bells in ((join.guest, guest), (join.model, model)):
                fds = [memory, *(bell.fd for bell in bells)]
                self._tell(domain, "ioreq_area", {"id": join.server, "guest": int(join.guest)}, fds)
        finally:
            for bell in ends:
                bell.close()
            close_all([memory])

    def gone(self, domain: DomId) -> None:
        """Its process is."""
        self._joined = {end for end in self._joined if end[0] != domain}
        for end in [end for end in self._bells if end[0] == domain]:
            self._bells.pop(end).close()
