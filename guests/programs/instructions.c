/* Instructions that Xen emulates, or that show what it runs on, in the kernel and in user mode: control registers, flags, traps. */
#include <bytes.h>

const char program_name[] = "instructions";

#define TF 0x100ul

static uint64_t cr0(void) { KERNEL("\x0f\x20\xc0", 0); return regs.rax; }
static uint64_t cr4(void) { KERNEL("\x0f\x20\xe0", 0); return regs.rax; }

static void control_registers(void)
{
    same(cr0() & ~8ul, 0x80050033, "CR0 as a PV guest sees it");
    same(KERNEL("\x0f\x01\xe0", 0), -1, "SMSW");
    same(regs.rax & ~8ul, 0x80050033, "shows the same");
    same(KERNEL("\x0f\x20\xc0\x48\x83\xc8\x08\x0f\x22\xc0\x0f\x20\xc0\x0f\x06\x0f\x20\xc2", 0), -1, "set CR0.TS, and CLTS");
    same(regs.rax & 8, 8, "it was set");
    same(regs.rdx & 8, 0, "and is not any more");
    same(KERNEL("\x0f\x20\xc0\x48\x83\xc8\x08\x0f\x22\xc0\xd9\xe8", 0), 7, "an x87 instruction with TS set is #NM");
    same(cr0() & 8, 0, "which clears TS");
    same(KERNEL("\x0f\x22\xc0", 0), 13, "another bit of CR0 cannot be changed: #GP");
    same(cr0() & ~8ul, 0x80050033, "CR0 is as before");
    same(KERNEL("\x0f\x01\xf0", 0x33), 13, "LMSW is #GP");
    same(KERNEL("\x0f\x22\xd0", 0x1234), -1, "MOV to CR2");
    same(vcpu0->arch.cr2, 0x1234, "is seen in the vCPU info");
    same(KERNEL("\x0f\x20\xd8\x0f\x22\xd8", 0), -1, "MOV to CR3 of the same root");
    same(KERNEL("\x0f\x22\xd8", 0), 13, "MOV to CR3 of a frame that is no page table is #GP");
    same(KERNEL("\x0f\x20\xc8", 0), 13, "there is no CR1");
    same(KERNEL("\x44\x0f\x20\xc0", 0), 13, "and no CR8");
    same(USER("\x0f\x20\xe0", 0), 13, "MOV from CR4 in user mode is #GP");
}

static void cr4_bits(void)
{
    uint64_t base = cr4();
    same(KERNEL("\x0f\x22\xe0", base | 4), -1, "set CR4.TSD");
    same(cr4(), base | 4, "it is set");
    same(KERNEL("\x0f\x31", 0), -1, "RDTSC in the kernel works all the same");
    same(USER("\x0f\x31", 0), 13, "in user mode it is #GP");
    same(USER("\x0f\x01\xf9", 0), 13, "and RDTSCP");
    KERNEL("\x0f\x22\xe0", base);
    same(USER("\x0f\x31", 0), NOTHING, "without TSD user mode may RDTSC");
    same(KERNEL("\xf3\x48\x0f\xae\xc0", 0), 6, "RDFSBASE without CR4.FSGSBASE is #UD");
    same(USER("\xf3\x48\x0f\xae\xc8", 0), 6, "and RDGSBASE in user mode");
    KERNEL("\x0f\x22\xe0", base | 1 << 16);
    if (cr4() & 1 << 16) {
        same(KERNEL("\xf3\x48\x0f\xae\xc0", 0), -1, "with it RDFSBASE works");
        same(USER("\xf3\x48\x0f\xae\xd0", 0x401000), NOTHING, "and WRFSBASE in user mode");
        static const struct { uint64_t base; bool written; } bases[] = {
            {0, true}, {0x7ffffffffffful, true}, {0x800000000000ul, false}, {~0ul >> 1, false}, {NOT_CANONICAL, false},
            {0xffff7ffffffffffful, false}, {0xffff800000000000ul, true}, {~0ul, true},
        };
        for (unsigned i = 0; i < ARRAY_SIZE(bases); i++) {
            same(KERNEL("\xf3\x48\x0f\xae\xd0", bases[i].base), bases[i].written ? -1 : 13, "WRFSBASE of 0x%lx", bases[i].base);
            same(USER("\xf3\x48\x0f\xae\xd8", bases[i].base), bases[i].written ? NOTHING : 13, "WRGSBASE of it in user mode");
        }
        KERNEL("\x0f\x22\xe0", base);
        same(USER("\xf3\x48\x0f\xae\xc0", 0), 6, "cleared, it is #UD again");
    } else
        skip("CR4.FSGSBASE", "the processor has none");
    same(KERNEL("\x0f\x22\xe0", base & ~0x20ul), -1, "PAE cannot be cleared, which is no fault");
    same(cr4(), base, "CR4 is as before");
    KERNEL("\x0f\x22\xe0", base | 8);
    same(KERNEL("\x0f\x21\xe0", 0), 6, "DR4 with CR4.DE set is #UD");
    KERNEL("\x0f\x22\xe0", base);
    same(KERNEL("\x0f\x21\xe0", 0), -1, "without it is DR6");
}

static void tables(void)
{
    same(USER("\x0f\x00\xc8", 0), NOTHING, "STR in user mode");
    same(caught.rax, 0xe040, "shows Xen's task register");
    same(USER("\x0f\x00\xc0", 0), NOTHING, "SLDT");
    same(caught.rax, 0, "a null LDT");
    same(KERNEL("\x0f\x01\x0b", 0), -1, "SIDT in the kernel");
    same(data[0] & 0xffff, 0xfff, "256 gates");
    uint64_t base = data[0] >> 16 | data[1] << 48;
    ok(base >= HYPERVISOR_VIRT_START && base < HYPERVISOR_VIRT_END, "in Xen's range");
    same(KERNEL("\x0f\x01\x03", 0), -1, "SGDT");
    base = data[0] >> 16 | data[1] << 48;
    ok(base >= HYPERVISOR_VIRT_START && base < HYPERVISOR_VIRT_END, "is there too");
    same(KERNEL("\x0f\x01\x13", 0), 13, "LGDT is #GP");
    same(KERNEL("\x0f\x01\x1b", 0), 13, "LIDT");
    same(KERNEL("\x0f\x00\xd0", 0), 13, "LLDT");
    same(KERNEL("\x0f\x00\xd8", 0), 13, "LTR");
    same(KERNEL("\x0f\x01\x3b", 0), 13, "INVLPG");
    same(KERNEL("\x0f\x01\xf8", 0), 13, "SWAPGS");
    same(KERNEL("\xf4", 0), 13, "HLT");
    same(KERNEL("\x0f\x08", 0), 13, "INVD");
    same(KERNEL("\x0f\x09", 0), -1, "WBINVD is emulated");
    same(USER("\x0f\x09", 0), 13, "but not in user mode");
    same(KERNEL("\x0f\x33", 0), 13, "RDPMC of a counter that is not there");
    same(caught.error, 0, "error code 0");
}

static void breakpoints_and_steps(void)
{
    /* popf with TF: the next instruction traps behind itself. */
    same(KERNEL("\x68\x02\x03\x00\x00\x9d\x90\x90", 0), 1, "single step in the kernel is #DB");
    same(caught.rip - (uint64_t)code, 7, "RIP behind the instruction");
    same(KERNEL("\x0f\x21\xf0", 0), -1, "MOV from DR6");
    same(regs.rax & 0x4000, 0x4000, "its BS bit is set");
    same(KERNEL("\x68\x02\x03\x00\x00\x9d\x0f\x20\xd0\x90", 0), 1, "of an emulated instruction");
    same(caught.rip - (uint64_t)code, 9, "behind it as well");
    same(USER("\x68\x02\x03\x00\x00\x9d\x90\x90", 0), 1, "and in user mode");
    same(caught.rip, USER_CODE + 7, "RIP behind the instruction");
    same(KERNEL("\x0f\x23\xf8\x0f\x21\xf8", 1ul << 32), 13, "MOV to DR7 of over 32 bits is #GP");
    same(KERNEL("\x0f\x23\xc0", HYPERVISOR_VIRT_START), 13, "a breakpoint in Xen's range is #GP");
    same(KERNEL("\x0f\x23\xc0", NOT_CANONICAL), 13, "or at an address that is not canonical");
}

static void addresses(void)
{
    same(KERNEL("\x48\x8b\x00", NOT_CANONICAL), 13, "a read of an address that is not canonical is #GP");
    /* As the processor manuals have it; QEMU's emulation up to 7.2 gives #GP. */
    same(KERNEL("\x55\x48\x89\xc5\x48\x8b\x45\x00\x5d", NOT_CANONICAL), 12, "by RBP it is #SS");
    same(USER("\x48\x89\xc4\x50", NOT_CANONICAL), 12, "and PUSH in user mode");
    same(USER("\x48\x89\xc5\x36\x48\x8b\x45\x00", NOT_CANONICAL), 12, "an override of SS changes nothing");
    same(USER("\x48\x89\xc5\x64\x48\x8b\x45\x00", NOT_CANONICAL), 13, "one of FS does: #GP");
    same(USER("\x49\x89\xc5\x49\x8b\x45\x00", NOT_CANONICAL), 13, "by R13 it is #GP");
    same(USER("\x48\x89\xc4\x48\x8b\x04\x24", NOT_CANONICAL), 12, "by RSP in a SIB byte #SS");
    same(KERNEL("\xff\xe0", NOT_CANONICAL), 13, "a jump to one is #GP");
    same(USER("\xff\xd0", NOT_CANONICAL), 13, "and a call in user mode");
    same(caught.error, 0, "error code 0");
}

static void interrupts(void)
{
    same(KERNEL("\xcd\x20", 0), 13, "INT 0x20 without a gate is #GP");
    same(caught.error & 7, 2, "its error code is of the IDT");
    same(caught.rip, (long)code, "RIP at it");
    same(USER("\xcd\x82", 0) == 13 || caught.vector == 4, true, "INT 0x82 is no hypercall of a 64-bit guest");
    same(USER("\x0f\x01\xd1", 1) == 6 || caught.vector == 6, true, "XSETBV in user mode is #UD or #GP by CR4.OSXSAVE");
}

void program(void)
{
    bytes_init();
    control_registers();
    cr4_bits();
    tables();
    breakpoints_and_steps();
    addresses();
    interrupts();
}
