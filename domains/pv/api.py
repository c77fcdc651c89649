"""The seams inside a PV domain process: memory by machine frame, the MMU, and what each needs of the other.

* `GuestFrames` is the domain's machine memory as this process sees it (implemented by `domains.pv.frames`).
* `PagingHost` is what the memory-management code (`domains/pv/mm/`) asks of the CPU side.
* `PagingApi` is the memory-management code itself (implemented by `domains.pv.mm.Mmu`): page types, page
  tables, descriptor tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from bus.addresses import DomId, MachineAddr, Mfn, VcpuId, VirtAddr
from domains.vcpu.api import Registers

FRAME_NONE = 0
"""`GuestFrames.ownership`: no frame is populated at this MFN."""
FRAME_RAM = 1
"""`GuestFrames.ownership`: guest RAM that the domain owns."""
FRAME_XEN = 2
"""`GuestFrames.ownership`: a Xen-heap frame that the guest may map (shared info, grant table, ...)."""


class GuestFault(Exception):
    """A guest-virtual address that cannot be used as asked. A hypercall answers -EFAULT."""

    def __init__(self, va: int, *, write: bool = False, present: bool = False) -> None:
        super().__init__(f"guest address {va:#x} is not {'writable' if write else 'readable'}")
        self.va = VirtAddr(va)
        self.write = write
        self.present = present
        """A translation exists, but does not permit the access (page-fault error code bit 0)."""


class Continuation(NamedTuple):
    """A hypercall was preempted and goes on later (hypercall_create_continuation): the CPU side puts `args`
    in the argument registers, in order, and has the guest execute the hypercall again (or does so itself
    after looking at events). Inside a multicall, the entry's `args` are rewritten instead."""

    args: tuple[int, ...]


class GuestFrames(Protocol):
    """Machine frames that this domain process can reach.

    A domain's own frames are one contiguous MFN range [base, base + count): first its guest RAM (as much as
    the domain may ever own), then its Xen-heap frames (shared info, grant table frames, ...). Frames granted
    by others may be mapped in addition, each at its own MFN.
    """

    base: Mfn
    count: int
    ram_count: int
    """The first `ram_count` frames of the range are guest RAM; the rest are Xen-heap frames shared with the
    guest."""
    words: memoryview
    """The own range as 64-bit words: word `(mfn - base) * 512 + i`. Format 'Q', writable."""
    octets: memoryview
    """The same memory as bytes: byte `(mfn - base) << 12 | offset`."""
    ownership: bytearray
    """FRAME_* of each frame of the own range, by `mfn - base`. Changed only by `set_owned` and `share`."""

    def owned(self, mfn: Mfn) -> bool:
        """The domain owns this RAM frame now (it was populated and not given back)."""

    def shared_by_xen(self, mfn: Mfn) -> bool:
        """A Xen-heap frame that the guest may map (shared info, grant table, ...)."""

    def foreign(self, mfn: Mfn) -> tuple[DomId, bool] | None:
        """For a frame that is mapped here by a live grant: (granter, writable). None for any other."""

    def page(self, mfn: Mfn) -> memoryview | None:
        """4096 bytes of any frame that is reachable here, own or granted; None if there is none."""

    def set_owned(self, mfn: Mfn, owned: bool) -> None:
        """A RAM frame is populated or given back. Call it through
        `PagingApi.populate_frames`/`release_frames` only."""

    def share(self, mfn: Mfn, shared: bool) -> None:
        """A Xen-heap frame becomes mappable by the guest, or no longer is. Through `PagingApi.share_frame`
        only."""


class PagingHost(Protocol):
    """What the MMU needs of the CPU side. Called only from within a call into the MMU, on the vCPU's
    thread."""

    def flush_tlb(self) -> None:
        """Drop cached translations of the vCPU that runs (the only one with any: vCPUs take turns, and a
        switch flushes)."""

    def drop_code(self, mfn: Mfn) -> None:
        """Drop translated code of a frame."""

    def load_cr3(self, kernel: Mfn, user: Mfn | None) -> None:
        """New page-table roots of the current vCPU; the one of its current mode is loaded into CR3,
        flushed."""

    def current_roots(self) -> tuple[Mfn, Mfn | None]:
        """(kernel, user) page-table roots of the current vCPU."""

    def is_kernel_mode(self) -> bool:
        """The current vCPU runs guest-kernel code (of the two CPL3 modes)."""

    def current_vcpu(self) -> VcpuId:
        """The vCPU on whose behalf the call is made."""

    def descriptor_tables_changed(self, vcpu: VcpuId) -> None:
        """GDT frames/limit or LDT base/limit of this vCPU changed (`PagingApi.gdt_entries`, `ldt_base`,
        `ldt_entries`): load GDTR/LDTR anew, if it is the current one; else when it next runs."""


class PagingApi(Protocol):
    """Xen's memory management for the domain (what `domains.pv.mm.Mmu` gives). Return values are Xen's: >=
    0, or a negative errno; nothing that a guest passes raises, except GuestFault from the virtual-memory
    access methods.

    The caller sets `writable_page_tables` and `m2p_strict` for VMASST_TYPE_writable_pagetables / _m2p_strict.
    """

    writable_page_tables: bool
    m2p_strict: bool

    # --- hypercalls (argument meanings as in xen.h) ---

    def mmu_update(self, reqs: int, count: int, pdone: int, foreigndom: int) -> int | Continuation:
        """HYPERVISOR_mmu_update: `count` mmu_update structures at guest address `reqs`."""

    def mmuext_op(self, uops: int, count: int, pdone: int, foreigndom: int) -> int | Continuation:
        """HYPERVISOR_mmuext_op."""

    def update_va_mapping(self, va: int, value: int, flags: int) -> int:
        """HYPERVISOR_update_va_mapping."""

    def update_va_mapping_otherdomain(self, va: int, value: int, flags: int, domid: int) -> int:
        """HYPERVISOR_update_va_mapping_otherdomain."""

    def update_descriptor(self, maddr: int, descriptor: int) -> int:
        """HYPERVISOR_update_descriptor: 8 bytes at a machine address."""

    def set_gdt(self, frame_list: int, entries: int) -> int:
        """HYPERVISOR_set_gdt: guest address of an array of MFNs, and a number of descriptors."""

    def install_gdt(self, vcpu: VcpuId, frames: Sequence[int], entries: int) -> int:
        """The same for any vCPU with the frames given (VCPUOP_initialise, start of the domain)."""

    # --- page-table roots and vCPU state ---

    def adopt_initial_tables(self, cr3_mfn: int) -> int:
        """Validate and pin the builder's L4 (as its MMUEXT_PIN_L4_TABLE), and take the reference that vCPU 0
        holds."""

    def take_root(self, mfn: int) -> int:
        """An L4 becomes root of a vCPU (VCPUOP_initialise): 0 or -EINVAL and so on. Kernel roots get the
        M2P."""

    def drop_root(self, mfn: int) -> None:
        """The vCPU no longer uses a root taken by `take_root`, `adopt_initial_tables` or
        NEW_(USER_)BASEPTR."""

    def destroy_vcpu(self, vcpu: VcpuId) -> None:
        """Release the GDT and LDT frames of a vCPU."""

    def gdt_base(self, vcpu: VcpuId) -> VirtAddr:
        """Virtual address of the vCPU's GDT in Xen's area; its limit is always 0xEFFF (Xen's descriptors
        included)."""

    def gdt_entries(self, vcpu: VcpuId) -> int:
        """Descriptors that the guest installed by set_gdt (vcpu_guest_context.gdt_ents)."""

    def ldt_base(self, vcpu: VcpuId) -> VirtAddr:
        """Virtual address for LDTR: the vCPU's LDT area in Xen's part (NOT the guest's own address)."""

    def ldt_entries(self, vcpu: VcpuId) -> int:
        """Entries of the LDT that the guest set; 0 for none."""

    def ldt_address(self, vcpu: VcpuId) -> int:
        """The guest's own address of that LDT."""

    # --- faults ---

    def write_fault(self, va: int, error_code: int, regs: Registers) -> bool:
        """Page-fault assist for writes to L1 tables (ptwr). True: done, `regs` has the state behind the
        instruction. False: the fault is the guest's. Only for faults of guest-kernel mode."""

    def ldt_fault(self, va: int, vcpu: VcpuId) -> bool | int:
        """A page fault on an address in Xen's LDT area. True: a page was mapped, run the instruction again.
        Otherwise the guest-virtual address that CR2 must show (the guest's own LDT address), or False if
        `va` is not there."""

    # --- guest memory by virtual address, through the kernel root of the current vCPU ---

    def translate(self, va: int, *, write: bool = False, user: bool = False) -> MachineAddr:
        """Machine address; `user` walks the user root. Raises GuestFault."""

    def read_virtual(self, va: int, length: int, *, user: bool = False) -> bytes:
        """Copy from guest memory. Raises GuestFault; refuses Xen's own area as access_ok does."""

    def write_virtual(self, va: int, data: bytes | bytearray | memoryview, *, user: bool = False) -> None:
        """Copy to guest memory. Raises GuestFault (then nothing beyond the faulting page was written)."""

    # --- grants: what this domain maps, and what it grants ---

    def create_grant_mapping(self, address: int, mfn: int, flags: int) -> int:
        """GNTMAP_host_map of a frame that `GuestFrames.foreign` (or own RAM) has. `address` is a virtual
        address, or the machine address of a PTE with GNTMAP_contains_pte. GNTST_*."""

    def replace_grant_mapping(self, address: int, mfn: int, new_address: int, flags: int) -> int:
        """Unmap (`new_address` 0) or GNTTABOP_unmap_and_replace. GNTST_*."""

    def can_grant_writable(self, mfn: int) -> bool:
        """A writable type reference could be had: no page table, no descriptor table."""

    def is_table(self, mfn: int) -> bool:
        """One of the domain's own frames, and a page table or a descriptor table: nothing may write there."""

    def hold_for_grant(self, mfn: int, writable: bool) -> int:
        """A domain maps this own frame by a grant: hold a (writable type) reference. 0, -EINVAL (not owned),
        -EBUSY."""

    def release_from_grant(self, mfn: int, writable: bool) -> None:
        """End of `hold_for_grant`."""

    # --- ownership ---

    def populate_frames(self, mfns: Iterable[int]) -> None:
        """The hypervisor gave these frames (populate_physmap, increase_reservation, exchange). ValueError if
        outside RAM."""

    def releasable(self, mfn: int) -> bool:
        """The frame is owned and has no reference: it could be released now."""

    def release_frames(self, mfns: Sequence[int]) -> int:
        """Give frames up. Returns how many of them, from the first, were released: it stops at one that is
        not owned, or is still referenced (mapped, typed, granted). The TLB is flushed."""

    def share_frame(self, mfn: int, shared: bool) -> int:
        """A Xen-heap frame (grant table, ...) becomes mappable, or no longer: -EBUSY while it is mapped."""

    # --- machine-to-physical table ---

    def set_m2p(self, mfn: int, pfns: Sequence[int]) -> None:
        """Entries from `mfn` on. Values are guest PFNs or INVALID_M2P_ENTRY."""

    def get_m2p(self, mfn: int) -> int:
        """The entry; INVALID_M2P_ENTRY outside the own range."""

    # --- debugging ---

    def check_invariants(self) -> list[str]:
        """Recompute every count from the page tables; each difference is a line. Empty: all is well."""
