"""Hand-made guests: what CPUID, MSRs, ports and memory show, and hypercalls from each mode."""

from __future__ import annotations

import struct

import pytest

from bus.abi import grant_table as gt
from bus.abi import memory as mem
from bus.abi.errno import XEN_EFAULT, XEN_EINVAL, XEN_ENOSYS, XEN_EPERM
from bus.abi.hvm import params
from bus.abi.hvm.hvm_op import HVMOP_guest_request_vm_event
from bus.abi.sched import SHUTDOWN_crash, SHUTDOWN_poweroff, SHUTDOWN_reboot
from bus.abi.xen import (
    HYPERVISOR_grant_table_op,
    HYPERVISOR_hvm_op,
    HYPERVISOR_memory_op,
    HYPERVISOR_sched_op,
    HYPERVISOR_vcpu_op,
    HYPERVISOR_xen_version,
)
from domains.hvm.calls import HVM_FEATURES
from domains.hvm.compat import hypercall_page
from domains.hvm.context import first_cpu, load_cpu, save_cpu
from tests.unit.hvm.hvm_rig import BASE, CODE, DATA, FRAMES, GDT, Rig, mov

pytestmark = pytest.mark.usefixtures("paging")

VMCALL, VMMCALL, HLT = "0f01c1", "0f01d9", "f4"


def arguments(bits: int, number: int, *values: int) -> str:
    """Registers of a hypercall."""
    names = ("edi", "esi", "edx") if bits == 64 else ("ebx", "ecx", "edx")
    return "".join(mov(name, value) for name, value in zip(names, values, strict=False)) + mov("eax", number)


def result(
    bits: int, number: int, *values: int, data: bytes = b"", instruction: str = VMCALL, cpl: int = 0
) -> tuple[int, Rig]:
    """RAX after a hypercall, as a signed 32-bit number."""
    rig = Rig(arguments(bits, number, *values) + instruction + "ebfe", bits=bits, cpl=cpl)
    rig.write(DATA, data)
    rig.run(1)
    return (rig.regs.rax & 0xFFFFFFFF ^ 1 << 31) - (1 << 31), rig


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("instruction", [VMCALL, VMMCALL])
def test_hypercall_from_each_mode_by_each_instruction(bits: int, instruction: str) -> None:
    rc, _ = result(bits, HYPERVISOR_xen_version, 0, 0, instruction=instruction)
    assert rc == 0x40011


@pytest.mark.parametrize("bits", [32, 64])
def test_a_request_for_a_monitor_is_made_and_nobody_listens(bits: int) -> None:
    assert result(bits, HYPERVISOR_hvm_op, HVMOP_guest_request_vm_event, 0)[0] == 0
    assert result(bits, HYPERVISOR_hvm_op, HVMOP_guest_request_vm_event, DATA)[0] == -XEN_EINVAL


@pytest.mark.parametrize("bits", [32, 64])
def test_hypercalls_are_the_kernels(bits: int) -> None:
    assert result(bits, HYPERVISOR_xen_version, 0, 0, cpl=3)[0] == -XEN_EPERM


@pytest.mark.parametrize("bits", [32, 64])
def test_features(bits: int) -> None:
    rc, rig = result(bits, HYPERVISOR_xen_version, 6, DATA, data=struct.pack("<II", 0, 0xFFFF))
    assert rc == 0
    assert rig.word(DATA + 4) == HVM_FEATURES


@pytest.mark.parametrize("bits", [32, 64])
def test_unknown_numbers_and_addresses(bits: int) -> None:
    assert result(bits, 63)[0] == -XEN_ENOSYS
    assert result(bits, 1000)[0] == -XEN_ENOSYS
    assert result(bits, HYPERVISOR_xen_version, 6, 0x50000000)[0] == -XEN_EFAULT


def test_add_to_physmap_of_32_bit_code_is_translated() -> None:
    data = struct.pack("<HHIII", 0x7FF0, 0, 0, 5, 0x123)
    rc, rig = result(32, HYPERVISOR_memory_op, mem.XENMEM_add_to_physmap, DATA, data=data)
    assert rc == 0
    number, command, sent = rig.upstream.calls[-1]
    assert (number, command) == (HYPERVISOR_memory_op, mem.XENMEM_add_to_physmap)
    assert mem.XEN_ADD_TO_PHYSMAP.unpack(sent) == mem.xen_add_to_physmap(0x7FF0, 0, 0, 5, 0x123)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize(("room", "asked"), [(1, 1), (128, 128), (129, 128), (1024, 128), (0xFFFFFFFF, 128)])
def test_the_buffer_for_the_memory_map_may_have_any_size(bits: int, room: int, asked: int) -> None:
    """Xen as a guest has room for 1,024 entries; no more than are there, or fit a message, are written."""
    entries = struct.pack("<QQI", 0, 0x1000, 1) + struct.pack("<QQI", 0x1000, 0x2000, 2)
    rig = Rig(
        arguments(bits, HYPERVISOR_memory_op, mem.XENMEM_memory_map, DATA) + VMCALL + "ebfe",
        bits=bits,
    )
    rig.write(DATA, struct.pack("<II" if bits == 32 else "<IxxxxQ", room, DATA + 64).ljust(128, b"\xee"))
    rig.upstream.answers[HYPERVISOR_memory_op, mem.XENMEM_memory_map] = lambda sent: (
        0,
        mem.XEN_MEMORY_MAP.pack(mem.XEN_MEMORY_MAP.unpack(sent)._replace(nr_entries=min(room, 2)))
        + entries[: 20 * min(room, 2)],
    )
    rig.run(1)
    assert rig.regs.rax == 0
    assert mem.XEN_MEMORY_MAP.unpack(rig.upstream.calls[-1][2]).nr_entries == asked
    assert rig.word(DATA) == min(room, 2)
    assert rig.buffer[DATA + 64 : DATA + 108] == entries[: 20 * min(room, 2)].ljust(44, b"\xee")


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_grant_operations_of_any_count_are_passed_on(count: int) -> None:
    """One structure, or an odd number of them, is as good as two."""
    layout = gt.GNTTAB_MAP_GRANT_REF
    data = b"".join(layout.pack(layout.zero()._replace(ref=8 + number)) for number in range(count))
    rc, rig = result(64, HYPERVISOR_grant_table_op, gt.GNTTABOP_map_grant_ref, DATA, count, data=data)
    assert rc == 0
    sent = [call[2] for call in rig.upstream.calls if call[0] == HYPERVISOR_grant_table_op]
    assert b"".join(sent) == data


def test_a_negative_count_of_grant_operations_is_einval() -> None:
    rc, _ = result(64, HYPERVISOR_grant_table_op, gt.GNTTABOP_map_grant_ref, DATA, 0x80000001)
    assert rc == -XEN_EINVAL


@pytest.mark.parametrize("bits", [32, 64])
def test_reservations_send_their_extents(bits: int) -> None:
    extents = struct.pack("<3I" if bits == 32 else "<3Q", 11, 12, 13)
    layout = "<IIIIH" if bits == 32 else "<QQIIH"
    data = struct.pack(layout, DATA + 64, 3, 0, 0, 0x7FF0).ljust(64, b"\0") + extents

    def answer(sent: bytes) -> tuple[int, bytes]:
        return 3, sent

    rig = Rig(
        arguments(bits, HYPERVISOR_memory_op, mem.XENMEM_decrease_reservation, DATA) + VMCALL + "ebfe",
        bits=bits,
    )
    rig.write(DATA, data)
    rig.upstream.answers[HYPERVISOR_memory_op, mem.XENMEM_decrease_reservation] = answer
    rig.run(1)
    assert rig.regs.rax == 3
    sent = rig.upstream.calls[-1][2]
    assert sent[mem.XEN_MEMORY_RESERVATION.size :] == struct.pack("<3Q", 11, 12, 13)


def test_32_bit_calls_that_nobody_translates_are_refused() -> None:
    rc, rig = result(32, HYPERVISOR_vcpu_op, 99, 0, DATA)
    assert rc == -XEN_ENOSYS
    assert rig.upstream.calls == []


def test_callback_parameter_acts_here_and_is_told_to_the_hypervisor() -> None:
    value = params.HVM_PARAM_CALLBACK_TYPE_VECTOR << 56 | 0xF3
    rc, rig = result(64, HYPERVISOR_hvm_op, 0, DATA, data=struct.pack("<HHIQ", 0x7FF0, 0, 0, value))
    assert rc == 0
    assert rig.domain.interrupts.callback_vector == 0xF3
    assert rig.upstream.calls[-1][0] == HYPERVISOR_hvm_op


@pytest.mark.parametrize("bits", [32, 64])
def test_hypercall_page_by_msr(bits: int) -> None:
    page = 0x30000
    call = f"{mov('eax', page + 32 * HYPERVISOR_xen_version)}ffd0"
    code = mov("ecx", 0x40000000) + mov("eax", page) + mov("edx", 0) + "0f30"
    first = "edi" if bits == 64 else "ebx"
    rig = Rig(code + mov(first, 0) + call + "ebfe", bits=bits)
    rig.run(1)
    assert rig.buffer[page : page + 4096] == hypercall_page()
    assert rig.regs.rax == 0x40011
    assert rig.domain.cpu.compat == (bits == 32)


def test_hypercall_page_where_no_memory_is_faults() -> None:
    rig = Rig(mov("ecx", 0x40000000) + mov("eax", 0x70000000) + mov("edx", 0) + "0f30" + HLT)
    rig.run()
    assert rig.word(DATA + 0xFF4) == 13


@pytest.mark.parametrize("index", [0x6E0, 0xC0010015, 0x40000001, 0x12345, 0x802])
def test_unknown_msrs_fault(index: int) -> None:
    for instruction in ("0f32", "0f30"):
        rig = Rig(mov("ecx", index) + mov("eax", 0) + mov("edx", 0) + instruction + HLT)
        rig.run()
        assert rig.word(DATA + 0xFF4) == 13


@pytest.mark.parametrize(
    ("index", "value"),
    [(0x1B, 0xFEE00900), (0xFE, 0x508), (0x2FF, 0xC06), (0x3A, 1), (0x8B, 0), (0x40000000, 0)],
)
def test_known_msrs(index: int, value: int) -> None:
    rig = Rig(mov("ecx", index) + "0f32ebfe")
    rig.run(1)
    assert rig.regs.rax == value


def test_mtrrs_keep_what_is_valid() -> None:
    rig = Rig(mov("ecx", 0x250) + mov("eax", 0x06060606) + mov("edx", 0x05040100) + "0f300f32ebfe")
    rig.run(1)
    assert (rig.regs.rax, rig.regs.rdx) == (0x06060606, 0x05040100)
    rig = Rig(mov("ecx", 0x250) + mov("eax", 2) + mov("edx", 0) + "0f30" + HLT)
    rig.run()
    assert rig.word(DATA + 0xFF4) == 13


def cpuid(leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
    """A leaf as a guest sees it."""
    rig = Rig(mov("eax", leaf) + mov("ecx", subleaf) + "0fa2ebfe")
    rig.run(1)
    r = rig.regs
    return r.rax, r.rbx, r.rcx, r.rdx


def test_xens_cpuid_leaves() -> None:
    top, *signature = cpuid(0x40000000)
    assert struct.pack("<3I", *signature) == b"XenVMMXenVMM"
    assert top == 0x40000005
    assert cpuid(0x40000001)[0] == 0x40011
    assert cpuid(0x40000002)[:2] == (1, 0x40000000)
    flags, vcpu, domid, _ = cpuid(0x40000004)
    assert (vcpu, domid) == (0, 7)
    assert flags & 1 << 3  # the vCPU's number is there
    assert flags & 1 << 6  # HVMOP_set_evtchn_upcall_vector
    assert not flags & 0b11  # no hardware APIC virtualisation


def test_cpuid_of_the_processor(paging: str) -> None:
    _, ebx, ecx, edx = cpuid(1)
    assert ecx >> 31 == 1  # hypervisor
    assert ecx >> 21 & 1  # x2APIC
    assert not ecx >> 24 & 1  # TSC deadline
    assert not ecx >> 28 & 1  # AVX
    assert edx >> 9 & 1  # APIC
    assert not edx >> 7 & 1  # machine check
    assert ebx >> 24 == 0
    assert cpuid(0x80000008)[0] & 0xFF == (40 if paging == "hap" else 39)


def test_ports_and_addresses_with_nothing_behind_them_read_as_ones() -> None:
    rig = Rig(f"{mov('edx', 0x60)}ed89c6{mov('ebx', 0xD0000000)}31c08b038903ebfe")
    rig.run(3)
    assert rig.regs.rsi == 0xFFFFFFFF
    assert rig.regs.rax == 0xFFFFFFFF
    assert not rig.domain.finished


def test_debug_port_makes_log_lines() -> None:
    rig = Rig(mov("edx", 0xE9) + "".join(mov("eax", byte) + "ee" for byte in b"hello\n") + "ebfe")
    rig.run(1)
    assert rig.upstream.lines == ["hello"]


# ------------------------------------------------------------------ guests that go wrong


def test_a_triple_fault_reboots_the_domain_with_a_dump() -> None:
    rig = Rig("0f0b")
    rig.write(GDT, bytes(32))
    rig.domain.vcpu.regs.idtr_limit = 0
    rig.run()
    assert rig.domain.life.shutdown_code == SHUTDOWN_reboot
    assert any("triple fault" in line for line in rig.upstream.lines)
    assert any("RIP:" in line for line in rig.upstream.lines)


def test_a_jump_into_nothing_crashes_the_domain() -> None:
    rig = Rig(mov("eax", 0xD0000000) + "ffe0")
    rig.run()
    assert rig.domain.life.shutdown_code == SHUTDOWN_crash
    assert any("where nothing is" in line for line in rig.upstream.lines)


def test_touching_nothing_everywhere_is_bounded() -> None:
    # mov ebx, 0x80000000; 1: mov eax, [rbx]; add ebx, 4096; cmp ebx, 0x80000000 + 3000 pages; jne 1b; hlt
    end = 0x80000000 + 3000 * 4096
    rig = Rig(
        mov("ebx", 0x80000000) + "8b0381c300100000" + "81fb" + struct.pack("<I", end).hex() + "75f0" + HLT
    )
    rig.run(4000)
    assert rig.domain.life.shutdown_code == SHUTDOWN_poweroff
    assert rig.regs.rax == 0xFFFFFFFF


def test_a_storm_of_ports_is_ended_by_the_slice() -> None:
    rig = Rig(mov("edx", 0x80) + "eeebfd")
    slice_ = rig.domain.run_slice()
    assert slice_.runnable
    assert rig.domain.exits.counts["out"] > 1000


def test_hlt_without_interrupts_on_the_last_vcpu_powers_off() -> None:
    rig = Rig("faf4")
    rig.run()
    assert rig.domain.life.shutdown_code == SHUTDOWN_poweroff
    assert rig.upstream.calls[-1][0] == HYPERVISOR_sched_op


def test_the_map_follows_the_hypervisors_news() -> None:
    rig = Rig(mov("ebx", 0x300000) + "8b03ebfe")
    rig.physmap.changed(0x300, BASE + FRAMES, 1, 1)  # the shared info appears there
    rig.write(rig.shared, b"\x78\x56\x34\x12")
    rig.run(1)
    assert rig.regs.rax == 0x12345678
    assert rig.physmap.gfn(BASE + FRAMES) == 0x300
    rig.physmap.changed(0x300, 0, 1, 0)
    assert rig.physmap.mfn(0x300) is None
    rig.domain.vcpu.regs.rip = CODE
    rig.run(2)
    assert rig.regs.rax == 0xFFFFFFFF


@pytest.mark.parametrize("bits", [32, 64])
def test_bits_of_cr4_that_no_feature_backs_fault(bits: int) -> None:
    """UMIP (11), VMXE (13), LA57 (12), PKE (22) are not shown by CPUID; PGE (7) and MCE (6) may be set."""
    for bit in (11, 12, 13, 22):
        rig = Rig(f"0f20e0 0d{struct.pack('<I', 1 << bit).hex()} 0f22e0 ebfe", bits=bits)
        rig.run(2)
        assert rig.word(DATA + 0xFF4) == 13, f"CR4 bit {bit}"
        assert not rig.regs.cr4 >> bit & 1
    rig = Rig("0f20e0 0dc0000000 0f22e0 ebfe", bits=bits)
    rig.run(2)
    assert rig.word(DATA + 0xFF4) == 0
    assert rig.regs.cr4 & 0xC0 == 0xC0


def test_cpuid_faulting_is_for_user_mode() -> None:
    """PLATFORM_INFO offers it; MISC_FEATURES_ENABLES turns it on; the kernel's CPUID goes on."""
    turn_on = mov("ecx", 0x140) + mov("eax", 1) + "31d2 0f30"
    rig = Rig(mov("ecx", 0xCE) + "0f32 89c3" + turn_on + "31c0 0fa2 ebfe")
    rig.run(2)
    assert rig.word(DATA + 0xFF4) == 0
    assert rig.regs.rbx == 0x756E6547  # of "GenuineIntel": CPUID was executed
    for on, ends in (
        (0, None),
        (1, SHUTDOWN_reboot),
    ):  # user mode has no stack for the kernel here: #GP is a triple fault
        user = Rig("31c0 0fa2 ebfe", cpl=3)
        user.domain.states[0].misc_features = on
        user.run(1)
        assert user.domain.life.shutdown_code == ends


@pytest.mark.parametrize("bits", [32, 64])
def test_the_context_shows_what_the_guest_left_in_its_registers(bits: int) -> None:
    """XEN_DOMCTL_gethvmcontext: HEADER, CPU, END; what it gives is what `first_cpu` reads, and starts the same state."""
    code = mov("ebx", 0x1234) + mov("eax", 0x55) + "0f23c0 0f22d0 ebfe"  # DR0 and CR2 as well
    rig = Rig(code, bits=bits)
    rig.run(2)
    context = rig.domain.context()
    cpu = first_cpu(context)
    assert (cpu.rbx, cpu.dr0, cpu.cr2) == (0x1234, 0x55, 0x55)
    assert cpu.rip == CODE + len(bytes.fromhex(code)) - 2
    assert cpu.cr0 & 1
    assert cpu.msr_efer == (0x500 if bits == 64 else 0)
    assert (cpu.cs_sel, cpu.cs_arbytes & ~1) == ((8, 0xA9A) if bits == 64 else (0x18, 0xC9A))
    assert (cpu.gdtr_base, cpu.gdtr_limit, cpu.rsp) == (GDT, 31, 0x8000)
    again = Rig("ebfe", bits=bits)
    load_cpu(again.domain.vcpu, cpu)
    # Of debug registers only reading is built.
    assert save_cpu(again.domain.vcpu, 0)._replace(tsc=0, dr0=0) == cpu._replace(tsc=0, dr0=0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_lists_of_grant_operations_have_any_length(count: int) -> None:
    """As many structures as the count says go to the hypervisor."""
    rc, rig = result(64, HYPERVISOR_grant_table_op, gt.GNTTABOP_map_grant_ref, DATA, count)
    assert rc == 0
    number, command, sent = rig.upstream.calls[-1]
    assert (number, command) == (HYPERVISOR_grant_table_op, gt.GNTTABOP_map_grant_ref)
    assert len(sent) == count * gt.GNTTAB_MAP_GRANT_REF.size


@pytest.mark.parametrize("bits", [32, 64])
def test_the_debug_registers_at_first(bits: int) -> None:
    """As XTF's debug-regs has them: nothing is armed, CR4.DE is clear, DEBUGCTL is 0."""
    reads = {"0f21c0": 0, "0f21c8": 0, "0f21d0": 0, "0f21d8": 0, "0f21f0": 0xFFFF0FF0, "0f21f8": 0x400}
    for code, value in reads.items():
        rig = Rig(code + "ebfe", bits=bits)
        rig.run(1)
        assert rig.regs.rax == value, code
    rig = Rig("0f20e0 ebfe", bits=bits)
    rig.run(1)
    assert not rig.regs.rax & 8
    rig = Rig(mov("ecx", 0x1D9) + mov("eax", 7) + mov("edx", 7) + "0f32ebfe", bits=bits)
    rig.run(1)
    assert (rig.regs.rax, rig.regs.rdx) == (0, 0)
