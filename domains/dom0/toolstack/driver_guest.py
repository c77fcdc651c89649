"""DomIO as a guest program: a PV domain that is built from a kernel file, and built again in place when its process ended.

The last LEDGER_PAGES of its memory keep their content when it is built again, as do its domain id, its event channels, what was granted
to it, and its xenstore ring: the command line tells the program where they are (`ledger=PFN,PAGES`) and whether it is its first life
(`life=N`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from bus.abi.xen import DOMID_SELF
from bus.addresses import PAGE_SHIFT, DomId, Mfn, Port, VcpuId
from domains.dom0.builder.errors import BuildError
from domains.dom0.builder.kernel import Kernel, load_kernel
from domains.dom0.toolstack.images import ForeignMemory, build_pv_domain, read_file
from domains.dom0.xc import E820_RAM, ControlInterface
from domains.native.domain import HypercallError, NativeDomain

PAGES: Final = 16384
"""Its memory: image, requests, queues, ledgers (64 MiB)."""
LEDGER_PAGES: Final = 2048
ROLE: Final = 4
"""`ssidref` of XEN_DOMCTL_createdomain (hypervisor.core.domains.ROLES)."""
EBUSY: Final = 16
ZERO: Final = bytes(1 << 20)


class DriverGuest:
    """See the module. One such domain lives at a time."""

    def __init__(self, host: NativeDomain, xc: ControlInterface, image: int, path: str) -> None:
        """`image`: the kernel file's descriptor, which stays the caller's. BuildError, ValueError."""
        self._host: Final = host
        self._xc: Final = xc
        self._path: Final = path
        self._kernel: Final[Kernel] = load_kernel(read_file(image, path))
        self._mfns = range(0)
        self._ports = (Port(0), Port(0))
        self._lives = 0

    def create(self, wanted: DomId, introduce: Callable[[DomId, Port, int], None]) -> DomId:
        """A new domain, running, with that number, or one of the hypervisor's choice for 0. `introduce` (domain, xenstore's port, pages)
        writes its nodes and connects it to xenstored, before it is unpaused. BuildError, HypercallError."""
        xc, host = self._xc, self._host
        domid = xc.create_domain(uuid=os.urandom(16), max_vcpus=1, ssidref=ROLE, domid=wanted)
        try:
            xc.max_vcpus(domid, 1)
            xc.max_mem(domid, PAGES << 2)
            xc.set_memory_map(domid, [(0, PAGES << PAGE_SHIFT, E820_RAM)])
            mfns = xc.populate(domid, range(PAGES))
            if mfns[-1] - mfns[0] != PAGES - 1:
                raise BuildError(f"{self._path}: DomIO's memory is not contiguous")
            self._mfns = range(mfns[0], mfns[0] + PAGES)
            self._ports = host.alloc_unbound(domid, DOMID_SELF), host.alloc_unbound(domid, DOMID_SELF)
            self._lives = 0
            self._build(domid)
            introduce(domid, self._ports[0], PAGES)
        except BaseException:
            xc.destroy(domid)
            raise
        xc.unpause(domid)
        return domid

    def restart(self, domid: DomId) -> bool:
        """A new process for it, with the program in its first state and the ledgers as they are. False: the old process has not ended
        yet (VIRQ_DOM_EXC comes again). BuildError, HypercallError."""
        xc = self._xc
        xc.pause(domid)
        try:
            xc.resume(domid)
        except HypercallError as error:
            xc.unpause(domid)
            if error.errno == EBUSY:
                return False
            raise
        self._build(domid)
        xc.unpause(domid)
        return True

    def _build(self, domid: DomId) -> None:
        fd, extent = self._host.foreign_extents[domid]
        memory = ForeignMemory(fd, extent["base"], extent["frames"])
        first = self._lives == 0
        kept = PAGES - LEDGER_PAGES
        try:
            if not first:
                start, end = (number << PAGE_SHIFT for number in (0, kept))
                offset = (self._mfns[0] - memory.base) << PAGE_SHIFT
                for at in range(start, end, len(ZERO)):
                    memory.view[offset + at : offset + at + len(ZERO)] = ZERO
            built = build_pv_domain(
                memory,
                self._kernel,
                b"",
                f"ledger={kept},{LEDGER_PAGES} life={self._lives}",
                self._mfns,
                Mfn(extent["shared_info"]),
                *self._ports,
                self._xc.grant_table_frame(domid) if first else None,
                DomId(0),
            )
        finally:
            memory.close()
        self._lives += 1
        self._xc.set_vcpu_context(domid, VcpuId(0), built.context)
