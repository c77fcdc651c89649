"""What must hold between any two calls (docs/architecture.md, section 2, as far as the core's own records say). For
tests and the
simulation: each violation is one line of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from bus.addresses import DomId
from hypervisor.core.core import HypervisorCore
from hypervisor.core.domains import Domain, Dying
from hypervisor.core.event_channels import Channel, State
from hypervisor.core.frames import FREE, LEAVING, RAM, XENHEAP
from hypervisor.core.p2m import P2mType

OWN: Final = P2mType.RAM.value
FOREIGN: Final = P2mType.FOREIGN.value
References = Callable[[], Iterable[int]]
"""MFNs of all references that a subsystem holds, one for each reference."""


class InvariantChecker:
    """Checks one core. Subsystems outside this package's core (grants, IOMMU) add what they hold."""

    def __init__(self, core: HypervisorCore) -> None:
        self._core = core
        self._sources: list[References] = [self._fifo_frames, self._foreign_frames]

    def add_references(self, source: References) -> None:
        """Another holder of references on frames."""
        self._sources.append(source)

    def check(self) -> list[str]:
        """All violations; empty if all is well."""
        return [*self._frames(), *self._maps(), *self._channels(), *self._domains()]

    def assert_holds(self) -> None:
        """AssertionError that lists the violations, if there are any."""
        problems = self.check()
        if problems:
            raise AssertionError("; ".join(problems[:20]))

    # -- holders of references
    # ------------------------------------------------------------------------------------

    def _fifo_frames(self) -> Iterable[int]:
        for domain in self._core.domains:
            fifo = self._core.events.ports_of(domain.domid).fifo
            if fifo is not None:
                yield from (int(mfn) for mfn, _ in fifo.control.values())
                yield from (int(mfn) for mfn in fifo.array)

    def _foreign_frames(self) -> Iterable[int]:
        for domain in self._core.domains:
            if domain.p2m is not None:
                yield from domain.p2m.foreign()

    # -- checks
    # ---------------------------------------------------------------------------------------------------

    def _frames(self) -> Iterable[str]:
        frames = self._core.frames
        held = Counter(mfn for source in self._sources for mfn in source())
        used, reached = 0, 0
        for extent in frames.extents():
            if extent.base < reached:
                yield f"the range at {extent.base:#x} overlaps the one before"
            reached = extent.end
            if self._core.domains.get(extent.domain) is None:
                yield f"the range at {extent.base:#x} belongs to domain {extent.domain}, which is no more"
            # By the containers' own counting: most frames are of no interest, and a range may have millions.
            state, refs = extent.state, extent.refs
            leaving = state.count(RAM | LEAVING) + state.count(XENHEAP | LEAVING)
            ram = state.count(RAM) + state.count(RAM | LEAVING)
            xenheap = state.count(XENHEAP) + state.count(XENHEAP | LEAVING)
            referred = len(refs) - refs.count(0)
            used += ram + xenheap
            if ram + xenheap + state.count(FREE) != extent.count:
                yield f"domain {extent.domain} has frames in an unknown state"
            if (ram, xenheap) != (extent.ram, extent.xenheap):
                yield f"domain {extent.domain}: the counts of its frames are wrong"
            if extent.referenced != referred:
                yield f"domain {extent.domain}: the count of referenced frames is wrong"
            touched = {m - extent.base for m in held if extent.base <= m < extent.end}
            if referred:
                touched.update(i for i, n in enumerate(refs) if n)
            if leaving:
                touched.update(i for i, n in enumerate(state) if n & LEAVING)
            for index in touched:
                references, mfn = refs[index], extent.base + index
                if references != held.pop(mfn, 0):
                    yield f"frame {mfn:#x}: {references} references counted, not so many held"
                if references and state[index] == FREE:
                    yield f"frame {mfn:#x} is free and referred to"
                if state[index] & LEAVING and not references:
                    yield f"frame {mfn:#x} is leaving and nobody holds it"
        if held:
            yield f"references to frames that are not there: {[hex(m) for m in held]}"
        if used != frames.total_pages - frames.free_pages:
            yield f"{used} frames used, {frames.total_pages - frames.free_pages} counted"
        if used > frames.total_pages:
            yield "more frames are used than the machine has"

    def _maps(self) -> Iterable[str]:
        frames = self._core.frames
        for domain in self._core.domains:
            p2m = domain.p2m
            if p2m is None:
                continue
            mapped = p2m.mapped()
            places = [(mfn, gfn) for gfn, mfn, kind in mapped if kind == OWN]
            own = dict(places)
            if len(own) < len(places):
                yield f"domain {domain.domid}: a frame is mapped twice"
            for mfn in own.keys() - frames.owned_of(domain.domid):
                yield f"domain {domain.domid} gfn {own[mfn]:#x}: frame {mfn:#x} is of {frames.owner(mfn)}"
            for mfn, gfn in places:
                if p2m.gfn_of(mfn) != gfn:
                    yield f"domain {domain.domid} gfn {gfn:#x}: the way back does not lead there"
            for gfn, mfn, kind in mapped:
                if kind == FOREIGN and frames.references(mfn) == 0:
                    yield f"domain {domain.domid} gfn {gfn:#x}: a foreign frame without a reference"

    def _channels(self) -> Iterable[str]:
        for domain in self._core.domains:
            ports = self._core.events.ports_of(domain.domid)
            if domain.dying is not Dying.ALIVE and ports.channels:
                yield f"dying domain {domain.domid} has ports"
            for port, channel in ports.channels.items():
                if port in ports.freed or port == 0:
                    yield f"domain {domain.domid} port {port} is free and in use"
                if domain.vcpu(channel.vcpu) is None and channel.vcpu:
                    yield f"domain {domain.domid} port {port} notifies a vCPU that is not there"
                yield from self._far_end(domain, port, channel)
            for (vcpu, virq), port in ports.virqs.items():
                found = ports.channels.get(port)
                if found is None or found.state is not State.VIRQ or found.number != virq:
                    yield f"domain {domain.domid}: VIRQ {virq} of vCPU {vcpu} leads to no port"
            for pirq, port in ports.pirqs.items():
                found = ports.channels.get(port)
                if found is None or found.state is not State.PIRQ or pirq not in ports.pirqs_permitted:
                    yield f"domain {domain.domid}: PIRQ {pirq} leads to no port"

    def _far_end(self, domain: Domain, port: int, channel: Channel) -> Iterable[str]:
        if channel.state is not State.INTERDOMAIN:
            return
        where = f"domain {domain.domid} port {port}"
        if self._core.domains.get(channel.remote_domain) is None:
            yield f"{where}: joined to domain {channel.remote_domain}, which is no more"
            return
        far = self._core.events.ports_of(channel.remote_domain).channels.get(channel.remote_port)
        if far is None or far.state is not State.INTERDOMAIN:
            yield f"{where}: the far end is not joined"
        elif (far.remote_domain, far.remote_port) != (domain.domid, port):
            yield f"{where}: the far end is joined to another port"

    def _domains(self) -> Iterable[str]:
        for domain in self._core.domains:
            if domain.dying is Dying.DEAD:
                if domain.process_alive:
                    yield f"dead domain {domain.domid} has a process"
                if self._core.frames.extent_of(domain.domid) is None:
                    yield f"dead domain {domain.domid} has nothing left and is still there"
            if domain.target is not None and self._core.domains.get(domain.target) is None:
                yield f"domain {domain.domid} has a target that is no more"
            if not domain.process_alive and self._core.outbox.outstanding(DomId(domain.domid)):
                yield f"domain {domain.domid} has orders outstanding and no process"
