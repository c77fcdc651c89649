"""Hypercalls that touch only the calling vCPU: trap table, stacks, callbacks, debug registers, segment bases, VM assists, iret.

Handlers take the five argument registers and return Xen's value, or NO_RESULT when they set all registers themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from struct import Struct
from typing import Final

from bus.abi import xen
from bus.abi.arch_x86 import TRAP_INFO
from bus.abi.arch_x86_64 import (
    SEGBASE_FS,
    SEGBASE_GS_KERNEL,
    SEGBASE_GS_USER,
    SEGBASE_GS_USER_SEL,
)
from bus.abi.callback import (
    CALLBACK_REGISTER,
    CALLBACK_UNREGISTER,
    CALLBACKF_mask_events,
    CALLBACKOP_register,
    CALLBACKOP_unregister,
    CALLBACKTYPE_event,
    CALLBACKTYPE_failsafe,
    CALLBACKTYPE_nmi,
    CALLBACKTYPE_syscall,
    CALLBACKTYPE_syscall32,
    CALLBACKTYPE_sysenter,
)
from bus.abi.errno import XEN_EINVAL, XEN_ENODEV, XEN_ENOSYS
from bus.abi.nmi import XENNMI_CALLBACK, XENNMI_register_callback, XENNMI_unregister_callback
from bus.addresses import canonical
from domains.pv.bounce import TI_IF, TRAP_NMI
from domains.pv.calls import NO_RESULT, Handler, Result
from domains.pv.cpu import Cpu
from domains.pv.debugreg import read_debugreg, set_debugreg
from domains.pv.iret import iret
from domains.pv.state import CR0_TS

MAX_TRAPS: Final = 4096
"""Entries of one set_trap_table; more than that without a terminator is answered EINVAL (the IDT has 256 vectors)."""
FIXED_CS: Final = 3
_TRAP: Final = Struct("<BBH4xQ")
_LOW32: Final = 0xFFFFFFFF
_ASSISTS: Final = frozenset(
    (
        xen.VMASST_TYPE_4gb_segments,
        xen.VMASST_TYPE_4gb_segments_notify,
        xen.VMASST_TYPE_writable_pagetables,
        xen.VMASST_TYPE_pae_extended_cr3,
        xen.VMASST_TYPE_architectural_iopl,
        xen.VMASST_TYPE_runstate_update_flag,
        xen.VMASST_TYPE_m2p_strict,
    )
)


def assists_valid(bitmap: int) -> bool:
    """Every bit is an assist that a 64-bit PV domain may have."""
    return not bitmap & ~sum(1 << kind for kind in _ASSISTS)


class CpuCalls:
    """See the module."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu

    def handlers(self) -> Mapping[int, Handler]:
        """By hypercall number."""
        return {
            xen.HYPERVISOR_set_trap_table: self.set_trap_table,
            xen.HYPERVISOR_stack_switch: self.stack_switch,
            xen.HYPERVISOR_set_callbacks: self.set_callbacks,
            xen.HYPERVISOR_fpu_taskswitch: self.fpu_taskswitch,
            xen.HYPERVISOR_set_debugreg: self.set_debugreg,
            xen.HYPERVISOR_get_debugreg: self.get_debugreg,
            xen.HYPERVISOR_vm_assist: self.vm_assist,
            xen.HYPERVISOR_iret: self.iret,
            xen.HYPERVISOR_set_segment_base: self.set_segment_base,
            xen.HYPERVISOR_nmi_op: self.nmi_op,
            xen.HYPERVISOR_callback_op: self.callback_op,
        }

    def iret(self, a1: int, a2: int, a3: int, a4: int, a5: int) -> Result:
        """HYPERVISOR_iret: never returns to its caller."""
        iret(self._cpu)
        return NO_RESULT

    def stack_switch(self, ss: int, esp: int, a3: int, a4: int, a5: int) -> Result:
        """Stack of the guest kernel for entries from user mode."""
        s = self._cpu.current
        s.kernel_ss = ss | FIXED_CS
        s.kernel_sp = esp
        return 0

    def set_segment_base(self, which: int, base: int, a3: int, a4: int, a5: int) -> Result:
        """Segment bases; the caller is in kernel mode, so the user's GS base is the inactive one."""
        r = self._cpu.regs
        which &= _LOW32
        if which == SEGBASE_GS_USER_SEL:
            return self._load_user_gs(base & 0xFFFF)
        if not canonical(base):
            return -XEN_EINVAL
        if which == SEGBASE_FS:
            r.fs_base = base
        elif which == SEGBASE_GS_USER:
            r.kernel_gs_base = base
        elif which == SEGBASE_GS_KERNEL:
            r.gs_base = base
        else:
            return -XEN_EINVAL
        return 0

    def _load_user_gs(self, selector: int) -> int:
        """A selector that cannot be loaded becomes null, as on Xen; the hypercall succeeds all the same."""
        cpu = self._cpu
        descriptor = cpu.descriptor(selector)
        if descriptor is not None and descriptor >> 40 & 0xF0 == 0xF0 and descriptor >> 40 & 0xA != 8:
            cpu.regs.kernel_gs_base = descriptor >> 16 & 0xFFFFFF | descriptor >> 56 << 24
            cpu.regs.gs = selector | 3
        else:
            cpu.regs.kernel_gs_base = 0
            cpu.regs.gs = selector if selector < 4 else 0
        return 0

    def fpu_taskswitch(self, set_it: int, a2: int, a3: int, a4: int, a5: int) -> Result:
        """CR0.TS."""
        s = self._cpu.current
        s.cr0 = s.cr0 | CR0_TS if set_it & _LOW32 else s.cr0 & ~CR0_TS
        self._cpu.apply_ts()
        return 0

    def set_debugreg(self, register: int, value: int, a3: int, a4: int, a5: int) -> Result:
        """Virtual debug registers 0 to 7."""
        rc = set_debugreg(self._cpu.current, register & _LOW32, value)
        self._cpu.debugreg_changed()
        return rc

    def get_debugreg(self, register: int, a2: int, a3: int, a4: int, a5: int) -> Result:
        """The register's value, or -ENODEV."""
        value = read_debugreg(self._cpu.current, register & _LOW32)
        return -XEN_ENODEV if value is None else value

    def set_trap_table(self, traps: int, a2: int, a3: int, a4: int, a5: int) -> Result:
        """Entries up to one with address 0; a null pointer clears the table. -EFAULT, -EINVAL (not canonical)."""
        s = self._cpu.current
        if not traps:
            s.trap_address[:] = [0] * 256
            s.trap_flags[:] = [0] * 256
            s.trap_cs[:] = [0] * 256
            return 0
        read = self._cpu.mmu.read_virtual
        for index in range(MAX_TRAPS):
            vector, flags, cs, address = _TRAP.unpack(read(traps + index * TRAP_INFO.size, TRAP_INFO.size))
            if not address:
                return 0
            if not canonical(address):
                return -XEN_EINVAL
            s.trap_address[vector] = address
            s.trap_flags[vector] = flags
            s.trap_cs[vector] = cs | FIXED_CS
        return -XEN_EINVAL

    # --- callbacks

    def set_callbacks(self, event: int, failsafe: int, syscall: int, a4: int, a5: int) -> Result:
        """Three callbacks at once; an address that is not canonical is left out, as on Xen, which always returns 0."""
        self._register(CALLBACKTYPE_event, 0, event)
        self._register(CALLBACKTYPE_failsafe, 0, failsafe)
        self._register(CALLBACKTYPE_syscall, 0, syscall)
        return 0

    def callback_op(self, cmd: int, arg: int, a3: int, a4: int, a5: int) -> Result:
        """CALLBACKOP_register, CALLBACKOP_unregister."""
        cmd &= _LOW32
        read = self._cpu.mmu.read_virtual
        if cmd == CALLBACKOP_register:
            register = CALLBACK_REGISTER.unpack(read(arg, CALLBACK_REGISTER.size))
            return self._register(register.type, register.flags, register.address)
        if cmd == CALLBACKOP_unregister:
            kind = CALLBACK_UNREGISTER.unpack(read(arg, CALLBACK_UNREGISTER.size)).type
            if kind == CALLBACKTYPE_nmi:
                self._cpu.current.trap_address[TRAP_NMI] = 0
                return 0
            if kind in (
                CALLBACKTYPE_event, CALLBACKTYPE_failsafe, CALLBACKTYPE_syscall, CALLBACKTYPE_sysenter,
                CALLBACKTYPE_syscall32,
            ):  # fmt: skip
                return -XEN_EINVAL
        return -XEN_ENOSYS

    def _register(self, kind: int, flags: int, address: int) -> int:
        if not canonical(address):
            return -XEN_EINVAL
        s = self._cpu.current
        masks = bool(flags & CALLBACKF_mask_events)
        if kind == CALLBACKTYPE_event:
            s.event_callback = address
        elif kind == CALLBACKTYPE_failsafe:
            s.failsafe_callback, s.failsafe_masks = address, masks
        elif kind == CALLBACKTYPE_syscall:
            s.syscall_callback, s.syscall_masks = address, masks
        elif kind == CALLBACKTYPE_syscall32:
            s.syscall32_callback, s.syscall32_masks = address, masks
        elif kind == CALLBACKTYPE_sysenter:
            s.sysenter_callback, s.sysenter_masks = address, masks
        elif kind == CALLBACKTYPE_nmi:
            self._register_nmi(address)
        else:
            return -XEN_ENOSYS
        return 0

    def _register_nmi(self, address: int) -> None:
        s = self._cpu.current
        s.trap_address[TRAP_NMI] = address
        s.trap_flags[TRAP_NMI] = TI_IF

    def nmi_op(self, cmd: int, arg: int, a3: int, a4: int, a5: int) -> Result:
        """XENNMI_register_callback, XENNMI_unregister_callback."""
        cmd &= _LOW32
        if cmd == XENNMI_register_callback:
            address = XENNMI_CALLBACK.unpack(
                self._cpu.mmu.read_virtual(arg, XENNMI_CALLBACK.size)
            ).handler_address
            if not canonical(address):
                return -XEN_EINVAL
            self._register_nmi(address)
            return 0
        if cmd == XENNMI_unregister_callback:
            self._cpu.current.trap_address[TRAP_NMI] = 0
            return 0
        return -XEN_ENOSYS

    # --- assists

    def vm_assist(self, cmd: int, kind: int, a3: int, a4: int, a5: int) -> Result:
        """VMASST_CMD_enable, VMASST_CMD_disable; -EINVAL for an assist that a 64-bit PV domain cannot have."""
        cmd &= _LOW32
        kind &= _LOW32
        if kind not in _ASSISTS:
            return -XEN_EINVAL
        cpu = self._cpu
        if cmd == xen.VMASST_CMD_enable:
            cpu.assists |= 1 << kind
        elif cmd == xen.VMASST_CMD_disable:
            cpu.assists &= ~(1 << kind)
        else:
            return -XEN_ENOSYS
        apply_assists(cpu)
        return 0


def apply_assists(cpu: Cpu) -> None:
    """Tell the memory management which of the assists that concern it are on."""
    cpu.mmu.writable_page_tables = bool(cpu.assists >> xen.VMASST_TYPE_writable_pagetables & 1)
    cpu.mmu.m2p_strict = bool(cpu.assists >> xen.VMASST_TYPE_m2p_strict & 1)
