"""Handlers and entries that tests of HVM vCPUs share."""

from __future__ import annotations

from domains.vcpu.hvm_testing import CODE, HANDLERS, STACK, TSS, HvmGuest

# A handler with an error code: pop rax; mov r15,[rsp] (RIP); mov rbx,cr2; out 0xf4,al; jmp $ (a stop asked
# for by OUT comes before the next block)
WITH_CODE = "58 4c8b3c24 0f20d3 e6f4ebfe"
WITHOUT_CODE = "4c8b3c24 e6f4ebfe"  # mov r15,[rsp]; out 0xf4,al; jmp $ (a stop asked for by OUT comes before the next block)


def protected_mode(guest: HvmGuest, code: str) -> None:
    """32-bit code at CODE with a flat GDT at 0x1000 (08 code, 10 data, 18/20 user, 28 TSS) and an IDT at
    0x2000."""
    flat = (0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF)
    tss = 0x0000890000000000 | 0x67 | TSS << 16
    guest.write(0x1000, b"".join(entry.to_bytes(8, "little") for entry in (0, *flat, tss)))
    guest.write(TSS + 4, STACK.to_bytes(4, "little") + (0x10).to_bytes(4, "little"))
    guest.write(TSS + 0x66, "6800")
    for vector in range(64):
        target = HANDLERS + 64 * vector
        gate = target & 0xFFFF | 8 << 16 | 0xEE << 40 | target >> 16 << 48
        guest.write(0x2000 + 8 * vector, gate.to_bytes(8, "little"))
        guest.write(target, "f4")
    vcpu = guest.vcpu
    vcpu.enter_pvh(CODE, 0)
    vcpu.regs.gdtr_base, vcpu.regs.gdtr_limit = 0x1000, 0x2F
    vcpu.regs.idtr_base, vcpu.regs.idtr_limit = 0x2000, 0x1FF
    vcpu.regs.rsp = STACK
    # jmp 8:+0; mov ax,0x10; mov ss,ax; mov ds,ax; mov ax,0x28; ltr ax
    entry = "ea" + (CODE + 7).to_bytes(4, "little").hex() + "0800 66b81000 8ed0 8ed8 66b82800 0f00d8"
    guest.write(CODE, entry + code)
