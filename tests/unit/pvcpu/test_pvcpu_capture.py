"""XEN_DOMCTL_getvcpucontext of a PV vCPU: before its first run, while it waits for its turn, and while it is the current one."""

from __future__ import annotations

from bus.abi import vcpu as v
from bus.abi import xen
from bus.abi.arch_x86 import VCPU_GUEST_CONTEXT, VGCF_IN_KERNEL, VGCF_online
from bus.addresses import VcpuId
from tests.unit.pvcpu.rig import CODE, DATA, KERNEL_STACK, Rig, call
from tests.unit.pvcpu.test_pvcpu_time_events import ap_context


def test_each_vcpu_is_seen_as_it_is() -> None:
    """Also one that was put away, while another runs; looking changes neither."""
    rig = Rig(2)
    place = DATA + 8 * 4096
    root = int(rig.state.kernel_root)
    assert rig.domain.context(VcpuId(1)) is None
    assert rig.domain.context(VcpuId(2)) is None
    rig.put(CODE + 2048, b"\x48\xff\xc0\xeb\xfb")  # inc rax; jmp
    rig.put(place, ap_context(CODE + 2048, KERNEL_STACK - 2048, root))
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_initialise, 1, place) == 0
    unborn = rig.domain.context(VcpuId(1))
    assert unborn is not None
    given = VCPU_GUEST_CONTEXT.unpack(rig.get(place, VCPU_GUEST_CONTEXT.size))
    assert unborn.flags == VGCF_IN_KERNEL
    assert unborn.user_regs == given.user_regs
    assert unborn.ctrlreg[3] == root << 12
    assert (unborn.kernel_sp, unborn.gs_base_kernel) == (KERNEL_STACK - 2048, 0x9000)
    assert call(rig, xen.HYPERVISOR_vcpu_op, v.VCPUOP_up, 1, 0) == 0
    rig.put(CODE, b"\x48\xff\xcb\xeb\xfb")  # dec rbx; jmp
    rig.regs.rip, rig.regs.rbx, rig.regs.rax = CODE, 1 << 40, 0x77
    while rig.cpu.current.id == 0 or not rig.regs.rax:
        rig.domain.run_slice()
    counted = rig.regs.rax
    rig.state.dr[2] = 0x1234
    for _ in range(2):
        first, second = rig.domain.context(VcpuId(0)), rig.domain.context(VcpuId(1))
        assert first is not None
        assert second is not None
        assert first.user_regs.rax == 0x77
        assert first.user_regs.rip in (CODE, CODE + 3)
        assert 0 < first.user_regs.rbx <= 1 << 40
        assert first.debugreg[2] == 0x1234
        assert second.flags & (VGCF_IN_KERNEL | VGCF_online) == VGCF_IN_KERNEL | VGCF_online
        assert (second.user_regs.rax, second.user_regs.rdi) == (counted, 0x55)
        assert VCPU_GUEST_CONTEXT.unpack(VCPU_GUEST_CONTEXT.pack(second)) == second
    for _ in range(3):
        rig.domain.run_slice()
    after = rig.domain.context(VcpuId(1))
    assert after is not None
    assert after.user_regs.rax > counted, "it went on from where it was"


def test_user_mode_has_its_own_root_and_gs() -> None:
    rig = Rig()
    rig.regs.gs_base, rig.regs.kernel_gs_base = 0x1000, 0x2000
    rig.state.iopl = 3 << 12
    rig.state.trap_address[6], rig.state.trap_flags[6] = CODE + 64, 4
    rig.go_user(b"\xeb\xfe")  # jmp $
    rig.domain.run_slice()
    found = rig.domain.context(VcpuId(0))
    assert found is not None
    assert not found.flags & VGCF_IN_KERNEL
    assert (found.gs_base_kernel, found.gs_base_user) == (0x1000, 0x2000)
    assert found.ctrlreg[1] == int(rig.state.user_root or 0) << 12 != found.ctrlreg[3]
    assert found.user_regs.rflags & 0x3000 == 0x3000
    assert found.trap_ctxt[6].address == CODE + 64
