"""An HVM vCPU whose MMU walks tables of the hypervisor's own (`domains.vcpu.shadow_mmu`).

Its physical addresses are the hypervisor's to give out: own memory lies at machine addresses, everything else at `window` +
guest-physical address; exits speak of guest-physical ones. Writes of CR0, CR4 and EFER always leave the guest, those of CR3 while
`watch_flushes(True)`, INVLPG always.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final, Protocol

from bus.addresses import MachineAddr
from domains.vcpu.api import GuestFault
from domains.vcpu.hvm_api import HvmExits
from domains.vcpu.hvm_vcpu import UnicornHvmVcpu
from domains.vcpu.insides import library
from domains.vcpu.shadow_mmu import SWITCHED, USER_INDEX, MissHandler, ShadowMmu, fill_function
from domains.vcpu.thunks import CodePage
from domains.vcpu.walk import GuestMemory, Space

NXE: Final = 1 << 11
"""In EFER."""
_Miss = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_int, ctypes.c_int)


class Tables(MissHandler, Space, Protocol):
    """Who builds the tables: `domains.hvm.shadow.Shadow`."""

    def physical(self, linear: int) -> int:
        """Guest-physical address of a linear one. NotMapped."""

    def mode_changed(self) -> None:
        """CR0 or CR4 was written."""

    def flushed(self) -> None:
        """CR3 was written."""

    def invalidate(self, linear: int) -> None:
        """INVLPG."""

    def nx_changed(self) -> None:
        """EFER.NXE changed."""

    def set_a20(self, enabled: bool) -> None:
        """Address line 20."""


class ShadowGuestMemory(GuestMemory):
    """Linear addresses by the guest's tables, which are not what the vCPU walks."""

    def __init__(self, tables: Tables, *rest: Any) -> None:
        super().__init__(tables, *rest)
        self._tables: Final = tables

    def physical(self, linear: int) -> int:
        """See GuestMemory."""
        return self._tables.physical(linear)


class ShadowHvmVcpu(UnicornHvmVcpu):
    """See the module. `pages` of memory for tables at physical address `pool`."""

    def __init__(self, exits: HvmExits, tables: Tables, mmu: ShadowMmu, pool: int, window: int) -> None:
        self._tables: Final = tables
        self._window: Final = window
        self._mmu: Final = mmu
        self._watching = False
        self._wanted_traps: set[int] = set()
        super().__init__(exits)
        self._memory.map(pool, mmu.host, mmu.pages * 4096, writable=True)
        self._flush(self._cpu)
        self.trap_invlpg(True)
        self.watch_flushes(False)

    def _guest_memory(self) -> GuestMemory:
        return ShadowGuestMemory(self._tables, self.regs, self._cpu)

    def _install(self) -> None:
        super()._install()
        found = self._found
        mmu = self._mmu
        mmu.use(self._control)
        handler = self._callback(_Miss, self._on_miss)
        original = library().address("x86_cpu_tlb_fill_x86_64")
        page = CodePage()
        code = fill_function(self._env, self._control.address, found, original, handler)
        function = page.add(code)
        page.seal()
        mmu.install(function, page, self._cpu, self._env, found)

    # ---- tables

    def _on_miss(self, linear: int, access: int, index: int) -> None:
        try:
            if access == SWITCHED:
                self._tables.switched()
            else:
                self._tables.miss(linear, access, index == USER_INDEX)
        except GuestFault as fault:
            self._fault(fault)
        except BaseException as error:
            self._undo(error)

    def load_tables(self, root: int) -> None:
        """For what is in the guest's control registers now."""
        regs = self.regs
        self._mmu.load((regs.cr0, regs.cr3, regs.cr4), root)

    def forget_tables(self) -> None:
        """Ask for others before the next walk."""
        self._mmu.forget()

    def watch_flushes(self, wanted: bool) -> None:
        """Tell of writes of CR3."""
        self._watching = wanted
        super().trap_control_writes(*self._wanted_traps | ({0, 3, 4} if wanted else {0, 4}))

    def trap_control_writes(self, *registers: int) -> None:
        """See UnicornHvmVcpu; others may be told of as well."""
        super().trap_control_writes(*registers)
        self._wanted_traps = set(registers)
        self.watch_flushes(self._watching)

    # ---- what the guest does to its registers

    def reset(self) -> None:
        """See UnicornHvmVcpu."""
        super().reset()
        self._mmu.forget()

    def set_control(self, number: int, value: int) -> None:
        """See UnicornHvmVcpu."""
        super().set_control(number, value)
        if number != 3:
            self._tables.mode_changed()

    def load_context(self, context: bytes) -> None:
        """See UnicornHvmVcpu."""
        super().load_context(context)
        self._mmu.forget()

    def set_a20(self, enabled: bool) -> None:
        """By the tables: the vCPU's own mask would change machine addresses."""
        self._tables.set_a20(enabled)

    def _invalidate(self, address: int) -> None:
        self._tables.invalidate(address)
        super()._invalidate(address)

    def _control_exit(self, number: int) -> None:
        if number == 3:
            self._tables.flushed()
        super()._control_exit(number)

    def _msr_exit(self) -> None:
        before = self.regs.efer
        super()._msr_exit()
        if (before ^ self.regs.efer) & NXE:
            self._tables.nx_changed()

    # ---- addresses

    def _on_mmio_read(self, uc: int, offset: int, size: int, user: int | None) -> int:
        return super()._on_mmio_read(uc, offset, size, (user or 0) & self._window - 1)

    def _on_mmio_write(self, uc: int, offset: int, size: int, value: int, user: int | None) -> None:
        super()._on_mmio_write(uc, offset, size, value, (user or 0) & self._window - 1)

    def _on_bad_access(self, uc: int, kind: int, address: int, size: int, value: int, user: int) -> bool:
        return super()._on_bad_access(uc, kind, address & self._window - 1, size, value, user)


__all__ = ["MachineAddr", "ShadowHvmVcpu"]
