"""A guest's process: what it is, PV or HVM, comes with the `configure` order. The HVM side is here; the loop, events and
doorbells are `PvProcess`'s.
"""

from __future__ import annotations

import time
from typing import Any, cast

from bus.abi.arch_x86 import VCPU_GUEST_CONTEXT, XEN_X86_EMU_PIC
from bus.abi.domctl import XEN_DOMCTL_SENDTRIGGER_NMI, XEN_DOMCTL_SENDTRIGGER_POWER, XEN_DOMCTL_CDF_hap
from bus.abi.errno import XEN_EINVAL, XEN_ENODATA, XEN_EOPNOTSUPP
from bus.abi.hypercalls import HYPERCALLS
from bus.addresses import PAGE_SIZE, Mfn, VcpuId
from bus.messages.domain import Order
from bus.packets import close_all
from bus.process import Start
from domains.domu.devices import GuestDevices
from domains.domu.pv_process import PvProcess
from domains.granting import Granting
from domains.hostmem import HostMemory
from domains.hvm.compat import hypercall_page
from domains.hvm.context import BadContext
from domains.hvm.domain import HvmConfig, HvmDomain
from domains.hvm.physmap import P2M_RAM, PhysicalMap
from domains.pv.calls_version import Identity
from domains.pv.domain import PvDomain


def shadow_pages(frames: int, vcpus: int) -> int:
    """Pages for shadow page tables: what libxl reckons (1 MiB a vCPU and two pages a MiB of memory)."""
    return 256 * vcpus + 2 * -(-frames >> 8)


class GuestProcess(PvProcess):
    """A PV guest's process until the `configure` order says otherwise."""

    def __init__(self, start: Start) -> None:
        """Connects and says hello."""
        super().__init__(start)
        self.hvm: HvmDomain | None = None
        self.physmap: PhysicalMap | None = None
        self._board = False
        self._hap = True
        self._params: dict[int, int] = {}
        self._places: dict[int, tuple[int, int]] = {}
        self._devices = GuestDevices(self.link, self.upstream.console_line)

    def _configure(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        result = super()._configure(order, fds)
        if order.body["kind"] == "hvm":
            self._board = bool(order.body["emulation_flags"] & XEN_X86_EMU_PIC)
            self._hap = bool(order.body["flags"] & XEN_DOMCTL_CDF_hap)
            self._handlers.update(
                {
                    "extent": self._hvm_extent,
                    "memory": self._hvm_memory,
                    "set_vcpu_context": lambda order, fds: (-XEN_EOPNOTSUPP, b""),
                    "set_hvm_context": self._set_hvm_context,
                    "get_hvm_context": self._get_hvm_context,
                    "get_vcpu_context": self._get_hvm_vcpu,
                    "hypercall_page": lambda order, fds: self._write_page(
                        Mfn(order.body["mfn"]), hypercall_page()
                    ),
                    "hvm_param": self._hvm_param,
                    "trigger": self._trigger,
                    "device_attached": self._device_attached,
                    "msi": self._msi,
                    "grant_attach": self._hvm_attach,
                    "grant_detach": self._hvm_detach,
                    "ioreq_area": self._ioreq_area,
                    "ioreq_server": self._ioreq_server,
                    "model_interrupt": self._model_interrupt,
                }
            )
        return result

    # ------------------------------------------------------------------ memory

    def _hvm_extent(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        body = order.body
        self.memory = HostMemory(fds[0], Mfn(body["base"]), body["frames"])
        self._shared_info = Mfn(body["shared_info"])
        physmap = self.physmap = PhysicalMap(Mfn(body["base"]), body["frames"], self.memory.address)
        self._granting = Granting(self.memory, changed=physmap.drop_code)
        return 0, b""

    def _hvm_memory(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        assert self.physmap is not None
        for gfn, mfn, count, kind in order.body.get("p2m", ()):
            self.physmap.changed(gfn, mfn, count, kind)
        return 0, b""

    def _drop_runs(self, runs: list[tuple[int, int]]) -> None:
        if self.physmap is None:
            super()._drop_runs(runs)
            return
        for first, count in runs:
            for mfn in range(first, first + count):
                self.physmap.drop_code(mfn)

    # ------------------------------------------------------------------ start

    def _hvm_param(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        if self.hvm is None:
            self._params[order.body["index"]] = order.body["value"]
        else:
            self.hvm.set_param(order.body["index"], order.body["value"])
        return 0, b""

    def _set_hvm_context(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        """The builder is done: the domain is made, its first vCPU in the state that the context names."""
        memory, physmap = self.memory, self.physmap
        if self.hvm is not None or memory is None or physmap is None:
            return -XEN_EINVAL, b""
        domain = HvmDomain(
            HvmConfig(
                self.domid,
                self._shared_info,
                self._max_vcpus,
                Identity(handle=self._handle),
                board=self._board,
                hap=self._hap,
                shadow_pages=shadow_pages(memory.frames, self._max_vcpus),
            ),
            physmap,
            memory.octets,
            memory.words,
            self.upstream,
            HYPERCALLS,
            wall=self._wall,
            monotonic=time.monotonic_ns,
        )
        try:
            domain.start(bytes(order.body["context"]))
        except BadContext as error:
            self.upstream.console_line(f"HVM context refused: {error}")
            return -XEN_EINVAL, b""
        for index, value in self._params.items():
            domain.set_param(index, value)
        functions = self._devices.make_functions(domain.msi)
        if functions:
            try:
                domain.give_devices(functions)
            except ValueError as error:
                self.upstream.console_line(f"devices refused: {error}")
                return -XEN_EINVAL, b""
        domain.exits.calls.trace = self._trace
        self.hvm = domain
        # It has what the inherited loop and orders use of a PvDomain.
        self.domain = cast(PvDomain, domain)
        return 0, b""

    def counters(self) -> dict[str, Any]:
        """As a PV guest's; and exits by kind, with those to the device model and the time that they took."""
        found = super().counters()
        if self.hvm is not None:
            exits = dict(self.hvm.exits.counts)
            if self.hvm.model is not None:
                model = self.hvm.model
                exits |= {"device model": model.accesses, "posted": model.posts}
                exits["device model us"] = model.waited_ns // 1000
            found["exits"] = exits
        return found

    def _get_hvm_context(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        """XEN_DOMCTL_gethvmcontext. A domain that was not started has no vCPU to show."""
        return (-XEN_EINVAL, b"") if self.hvm is None else (0, self.hvm.context())

    def _get_hvm_vcpu(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        """XEN_DOMCTL_getvcpucontext, with what an HVM guest has of it."""
        context = self.hvm.vcpu_context(VcpuId(order.body["vcpu"])) if self.hvm is not None else None
        return (0, VCPU_GUEST_CONTEXT.pack(context)) if context is not None else (-XEN_ENODATA, b"")

    def _trigger(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        """XEN_DOMCTL_SENDTRIGGER_*: NMI; the power button of a full HVM guest. A PVH guest has no buttons."""
        vcpu, trigger = VcpuId(order.body["vcpu"]), order.body["trigger"]
        board = self.hvm.board if self.hvm is not None else None
        if board is not None and self.hvm is not None and trigger == XEN_DOMCTL_SENDTRIGGER_POWER:
            board.acpi.press_power_button()
            self.hvm.ring()
        elif self.hvm is not None and trigger == XEN_DOMCTL_SENDTRIGGER_NMI and vcpu < len(self.hvm.states):
            state = self.hvm.states[vcpu]
            state.nmi = True
            state.wake()
            self.hvm.ring()
        return 0, b""

    # ------------------------------------------------------------------ devices of the guest's own

    def _device_attached(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        self._devices.attached(order.body, fds)
        return 0, b""

    def _msi(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        self._devices.message(order.body["bdf"], order.body["entry"])
        if self.hvm is not None:
            self.hvm.ring()
        return 0, b""

    # ------------------------------------------------------------------ device model

    def _ioreq_area(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        if self.hvm is None or self.hvm.board is None:
            close_all(fds)
            return -XEN_EINVAL, b""
        if self.hvm.model is not None:
            self._ear.remove(self.hvm.model.note.fd)
        model = self.hvm.join_model(order.body["id"], fds, self._duties)
        self._ear.add(model.note.fd)
        return 0, b""

    def _ioreq_server(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        model = self.hvm.model if self.hvm is not None else None
        if self.hvm is None or not self.hvm.model_changed(order.body):
            return -XEN_EINVAL, b""
        if model is not None and self.hvm.model is None:
            self._ear.remove(model.note.fd)
        return 0, b""

    def _model_interrupt(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        """The device model's hypercalls; what it does by notes does not come here."""
        board = self.hvm.board if self.hvm is not None else None
        if board is not None:
            body = order.body
            if "pci" in body:
                board.pci_line(body["pci"] >> 2, body["pci"] & 3, bool(body["level"]))
            elif "link" in body:
                board.set_link(body["link"], body["isa"])
            elif "isa" in body:
                board.isa_line(body["isa"], bool(body["level"]))
            else:
                board.msi(body["address"], body["data"])
        return 0, b""

    def _duties(self) -> None:
        """While an access waits for the device model: orders, events."""
        while self.link.dispatch():
            pass
        self._take_doorbells(self._ear.ready(0))
        self._drop_stale()

    def _take_doorbells(self, fds: list[int]) -> None:
        super()._take_doorbells(fds)
        model = self.hvm.model if self.hvm is not None else None
        if model is not None and model.note.fd in fds:
            model.carry_out()

    # ------------------------------------------------------------------ grants of others

    def _hvm_attach(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        """Put granted pages at their guest frames."""
        assert self.physmap is not None
        items: list[Any] = order.body["items"]
        self._windows.take(order.body, fds)
        for handle, mfn, number, index, writable, host_address, _flags, _granter in items:
            gfn = host_address >> 12
            self._places[handle] = (number, gfn)
            window = self._windows.use(number)
            if window is None:
                self.physmap.changed(gfn, mfn, 1, P2M_RAM)  # a frame of its own
                continue
            self.physmap.map_granted(gfn, window.address + index * PAGE_SIZE, writable=bool(writable))
        return 0, bytes(2 * len(items))

    def _hvm_detach(self, order: Order, fds: list[int]) -> tuple[int, bytes]:
        assert self.physmap is not None
        items: list[Any] = order.body["items"]
        for handle, *_ in items:
            number, gfn = self._places.pop(handle, (-1, 0))
            if number >= 0:
                self.physmap.unmap_granted(gfn)
                self._windows.leave(number)
        return 0, bytes(2 * len(items))
