/* Exceptions and their bounce frames in kernel and user mode, software interrupts, iret, SYSCALL, emulated instructions. */
#include <guest.h>

const char program_name[] = "traps";

#define USER_CODE 0x400000ul
#define USER_STACK 0x401000ul
#define UNMAPPED 0x200000ul

static char spare[PAGE_SIZE] PAGE_ALIGNED;

static void do_ud2(unsigned long a) { (void)a; __asm__ volatile("ud2"); }
static void do_int3(unsigned long a) { (void)a; __asm__ volatile("int3"); }
static void do_int80(unsigned long a) { (void)a; __asm__ volatile("int $0x80"); }
static void do_icebp(unsigned long a) { (void)a; __asm__ volatile(".byte 0xf1"); }
static void do_divide(unsigned long a) { __asm__ volatile("xor %%edx, %%edx; mov $1, %%eax; div %0" : : "r"((uint32_t)a) : "eax", "edx"); }
static void do_read(unsigned long a) { __asm__ volatile("mov (%0), %%rax" : : "r"(a) : "rax", "memory"); }
static void do_write(unsigned long a) { __asm__ volatile("movq $1, (%0)" : : "r"(a) : "memory"); }
static void do_call(unsigned long a) { __asm__ volatile("call *%0" : : "r"(a) : "memory"); }
static void do_lgdt(unsigned long a) { __asm__ volatile("lgdt (%0)" : : "r"(a) : "memory"); }
static void do_rdmsr(unsigned long a) { __asm__ volatile("rdmsr" : : "c"(a) : "eax", "edx"); }
static void do_wrmsr(unsigned long a) { __asm__ volatile("wrmsr" : : "c"(a), "a"(1), "d"(0)); }
static unsigned long cr_value;
static void do_read_cr0(unsigned long a) { (void)a; __asm__ volatile("mov %%cr0, %0" : "=r"(cr_value)); }
static void do_read_cr3(unsigned long a) { (void)a; __asm__ volatile("mov %%cr3, %0" : "=r"(cr_value)); }
static void do_read_cr2(unsigned long a) { (void)a; __asm__ volatile("mov %%cr2, %0" : "=r"(cr_value)); }
static void do_read_cr4(unsigned long a) { (void)a; __asm__ volatile("mov %%cr4, %0" : "=r"(cr_value)); }

static bool at_code(uint64_t rip, void (*body)(unsigned long)) { return rip >= (uint64_t)body && rip < (uint64_t)body + 64; }
static unsigned byte_at(uint64_t rip) { return *(unsigned char *)rip; }

static void kernel_exceptions(void)
{
    same(attempt(do_ud2, 0), 6, "UD2 is #UD");
    ok(at_code(caught.rip, do_ud2) && byte_at(caught.rip) == 0x0f, "with RIP at it");
    same(caught.cs & 3, 0, "the frame's CS has RPL 0: it came from the kernel");
    same(caught.cs >> 32 & 0xff, 0, "and its saved upcall mask is clear");
    ok(caught.rflags & 0x200, "IF is set in the frame while events are on");
    same(caught.ss & 0xffff, FLAT_KERNEL_SS, "SS is the kernel's");
    events_off();
    same(attempt(do_ud2, 0), 6, "UD2 with events off");
    same(caught.cs >> 32 & 0xff, 1, "saves the upcall mask");
    ok(!(caught.rflags & 0x200), "and IF is clear in the frame");
    same(vcpu0->evtchn_upcall_mask, 1, "iret gave the mask back");
    events_on();
    same(attempt(do_int3, 0), 3, "INT3 is #BP");
    ok(at_code(caught.rip, do_int3) && byte_at(caught.rip - 1) == 0xcc, "with RIP behind it");
    same(attempt(do_icebp, 0), 1, "ICEBP is #DB");
    ok(at_code(caught.rip, do_icebp) && byte_at(caught.rip - 1) == 0xf1, "with RIP behind it");
    same(attempt(do_divide, 0), 0, "division by zero is #DE");
    ok(at_code(caught.rip, do_divide) && byte_at(caught.rip) == 0xf7, "with RIP at it");
    same(attempt(do_int80, 0), 0x80, "INT 0x80 in the kernel goes to its handler");
    ok(byte_at(caught.rip - 2) == 0xcd && byte_at(caught.rip - 1) == 0x80, "with RIP behind it");
    same(attempt(do_divide, 1), -1, "a division that works traps nowhere");
}

static volatile unsigned mask_seen = 7;
static void look_at_mask(struct frame *frame)
{
    (void)frame;
    mask_seen = vcpu0->evtchn_upcall_mask;
}

static void returning(void)
{
    on_trap(3, look_at_mask);
    same(attempt(do_int3, 0), -1, "a #BP handler that returns goes on behind INT3");
    same(mask_seen, 0, "events stay on in a trap without flag 4");
    on_trap(0x80, look_at_mask);
    same(attempt(do_int80, 0), -1, "an INT 0x80 handler that returns");
    same(mask_seen, 1, "events were off in a trap with flag 4");
    same(vcpu0->evtchn_upcall_mask, 0, "and are on again after iret");
    on_trap(3, NULL);
    on_trap(0x80, NULL);
}

static void page_faults(void)
{
    same(attempt(do_read, UNMAPPED + 0x123), 14, "a read of nothing is #PF");
    same(caught.error, 0, "error code 0: not present, read, kernel");
    same(vcpu0->arch.cr2, UNMAPPED + 0x123, "its address is in the vCPU info");
    same(attempt(do_write, UNMAPPED + 0x456), 14, "a write to nothing is #PF");
    same(caught.error, 2, "error code 2: write");
    same(vcpu0->arch.cr2, UNMAPPED + 0x456, "with its address");
    uint64_t pte = read_pte(spare);
    same(set_pte(spare, (pte & PTE_FRAME) | PTE_RO), 0, "make a page read-only");
    same(attempt(do_read, (unsigned long)spare), -1, "a read of it works");
    same(attempt(do_write, (unsigned long)spare), 14, "a write is #PF");
    same(caught.error, 3, "error code 3: present, write");
    same(set_pte(spare, (pte & PTE_FRAME) | PTE_RW | 1ul << 63), 0, "make it writable and not executable");
    spare[0] = (char)0xc3; /* ret */
    same(attempt(do_call, (unsigned long)spare), 14, "a call into it is #PF");
    same(caught.error, 0x11, "error code 0x11: present, fetch");
    same(caught.rip, (long)spare, "with RIP at the page");
    same(set_pte(spare, (pte & PTE_FRAME) | PTE_RW), 0, "make it executable");
    same(attempt(do_call, (unsigned long)spare), -1, "now the call works");
    same(set_pte(spare, 0), 0, "take the mapping away");
    same(attempt(do_read, (unsigned long)spare), 14, "a read is #PF");
    same(set_pte(spare, (pte & PTE_FRAME) | PTE_RW), 0, "give it back");
}

static void privileged(void)
{
    static char table[10];
    same(attempt(do_lgdt, (unsigned long)table), 13, "LGDT is #GP");
    same(caught.error, 0, "error code 0");
    ok(at_code(caught.rip, do_lgdt), "with RIP at it");
    same(attempt(do_rdmsr, 0x12345678), 13, "RDMSR of an unknown register is #GP");
    same(attempt(do_wrmsr, 0x12345678), 13, "WRMSR of an unknown register is #GP");
    same(attempt(do_read_cr0, 0), -1, "MOV from CR0 is emulated");
    ok((cr_value & 0x80000001) == 0x80000001, "paging and protection are on");
    same(attempt(do_read_cr3, 0), -1, "MOV from CR3 is emulated");
    same(cr_value >> 12, virt_to_mfn((void *)start_info->pt_base), "it names the page-table root");
    same(attempt(do_read_cr4, 0), -1, "MOV from CR4 is emulated");
    ok(cr_value & 0x20, "PAE is on");
    attempt(do_read, UNMAPPED + 0x777);
    same(attempt(do_read_cr2, 0), -1, "MOV from CR2 is emulated");
    same(cr_value, UNMAPPED + 0x777, "it is the last fault's address");
}

static char l4[PAGE_SIZE] PAGE_ALIGNED, l3[PAGE_SIZE] PAGE_ALIGNED, l2[PAGE_SIZE] PAGE_ALIGNED, l1[PAGE_SIZE] PAGE_ALIGNED;
static char code[PAGE_SIZE] PAGE_ALIGNED, stack[PAGE_SIZE] PAGE_ALIGNED, kernel_stack[8192] PAGE_ALIGNED;

static uint64_t entry(const void *page, uint64_t flags) { return (uint64_t)virt_to_mfn(page) << PAGE_SHIFT | flags; }

static void user_tables(void)
{
    ((uint64_t *)l4)[0] = entry(l3, PTE_RW);
    ((uint64_t *)l3)[0] = entry(l2, PTE_RW);
    ((uint64_t *)l2)[USER_CODE >> 21 & 511] = entry(l1, PTE_RW);
    ((uint64_t *)l1)[USER_CODE >> 12 & 511] = entry(code, PTE_RO);
    ((uint64_t *)l1)[USER_STACK >> 12 & 511] = entry(stack, PTE_RW);
    char *tables[] = {l4, l3, l2, l1};
    bool fine = true;
    for (unsigned i = 0; i < 4; i++)
        fine &= !set_pte(tables[i], entry(tables[i], PTE_RO));
    ok(fine, "make the user page tables read-only");
    struct mmuext_op ops[] = {
        {.cmd = MMUEXT_PIN_L4_TABLE, .arg1.mfn = virt_to_mfn(l4)},
        {.cmd = MMUEXT_NEW_USER_BASEPTR, .arg1.mfn = virt_to_mfn(l4)},
    };
    unsigned done = 0;
    same(HYPERVISOR_mmuext_op(ops, 2, &done, DOMID_SELF), 0, "pin them and make them the user root");
    same(done, 2, "both operations done");
    same(HYPERVISOR_stack_switch(FLAT_KERNEL_SS, kernel_stack + sizeof(kernel_stack)), 0, "stack_switch");
}

static struct frame to_user;
static void enter_user(unsigned long a) { (void)a; enter_frame(&to_user); }

/* Run a few bytes of code in user mode until they trap; the vector. */
static int in_user(const char *bytes, size_t size)
{
    memset(code, 0xcc, 64);
    memcpy(code, bytes, size);
    memset(&to_user, 0, sizeof(to_user));
    to_user.rip = USER_CODE;
    to_user.cs = FLAT_USER_CS | 3;
    to_user.ss = FLAT_USER_SS;
    to_user.rsp = USER_STACK + 0x800;
    to_user.rflags = 0x202;
    to_user.rbx = 0x1122334455667788;
    to_user.rdi = UNMAPPED;
    to_user.rsi = (uint64_t)&start_info;
    return attempt(enter_user, 0);
}
#define IN_USER(bytes) in_user(bytes, sizeof(bytes) - 1)

static void from_syscall(struct frame *frame)
{
    caught = *frame;
    resume_kernel(frame);
}

static bool on_kernel_stack(void) { return caught.rsp == USER_STACK + 0x800; }

static void user_mode(void)
{
    on_syscall = from_syscall;
    same(IN_USER("\x0f\x05"), VECTOR_SYSCALL, "SYSCALL from user mode reaches the syscall callback");
    same(caught.rip, USER_CODE + 2, "RIP behind it");
    same(caught.rcx, USER_CODE + 2, "RCX the same");
    same(caught.r11 & 0x200, 0x200, "R11 has the flags");
    same(caught.cs & 3, 3, "CS has RPL 3: it came from user mode");
    ok(on_kernel_stack(), "RSP is the user's");
    same(caught.rbx, 0x1122334455667788, "other registers are the user's");
    same(IN_USER("\xcc"), 3, "INT3 in user mode");
    same(caught.rip, USER_CODE + 1, "RIP behind it");
    same(caught.cs & 3, 3, "from user mode");
    same(IN_USER("\xcd\x80"), 0x80, "INT 0x80 in user mode, DPL 3");
    same(caught.rip, USER_CODE + 2, "RIP behind it");
    same(IN_USER("\xcd\x06"), 13, "INT 6 in user mode, DPL 0, is #GP");
    /* As the processor manuals have it; QEMU's emulation up to 7.2 gives 6 * 16 + 2. */
    same(caught.error, 6 * 8 + 2, "error code: vector 6 of the IDT");
    same(caught.rip, USER_CODE, "RIP at it");
    same(IN_USER("\x0f\x0b"), 6, "UD2 in user mode");
    same(IN_USER("\xf4"), 13, "HLT in user mode is #GP");
    same(caught.error, 0, "error code 0");
    same(IN_USER("\x0f\x20\xc0"), 13, "MOV from CR0 in user mode is #GP");
    same(IN_USER("\x48\x8b\x07"), 14, "a read of nothing in user mode is #PF");
    same(caught.error, 4, "error code 4: user");
    same(vcpu0->arch.cr2, UNMAPPED, "with its address");
    same(IN_USER("\x48\x89\x07"), 14, "a write to nothing in user mode");
    same(caught.error, 6, "error code 6: user, write");
    same(IN_USER("\x48\x8b\x06"), 14, "the kernel's data cannot be read in user mode");
    same(caught.error & ~1ul, 4, "error code: user");
    same(IN_USER("\x48\xc7\x05\xf5\xff\xff\xff\x00\x00\x00\x00"), 14, "user code cannot write to its read-only page");
    same(caught.error, 7, "error code 7: present, write, user");
    same(IN_USER("\x31\xd2\x31\xc9\xf7\xf1"), 0, "division by zero in user mode");
    same(IN_USER("\x50\x0f\x05"), VECTOR_SYSCALL, "user mode has a stack of its own");
    same(caught.rsp, USER_STACK + 0x7f8, "which PUSH moved");
}

static void segment_bases(void)
{
    same(HYPERVISOR_set_segment_base(SEGBASE_FS, 0x401100), 0, "set_segment_base FS");
    same(HYPERVISOR_set_segment_base(SEGBASE_GS_USER, 0x401200), 0, "set_segment_base user GS");
    same(HYPERVISOR_set_segment_base(SEGBASE_GS_KERNEL, (unsigned long)spare), 0, "set_segment_base kernel GS");
    *(uint64_t *)spare = 0x5a5a;
    uint64_t value;
    __asm__ volatile("mov %%gs:0, %0" : "=r"(value));
    same(value, 0x5a5a, "the kernel's GS base is its own");
    *(uint64_t *)(stack + 0x100) = 0xf5f5;
    *(uint64_t *)(stack + 0x200) = 0x6565;
    same(IN_USER("\x64\x48\x8b\x04\x25\x00\x00\x00\x00\x65\x48\x8b\x14\x25\x00\x00\x00\x00\x0f\x05"), VECTOR_SYSCALL, "user code reads FS and GS");
    same(caught.rax, 0xf5f5, "FS base");
    same(caught.rdx, 0x6565, "user GS base");
    __asm__ volatile("mov %%gs:0, %0" : "=r"(value));
    same(value, 0x5a5a, "and the kernel has its own again");
    same(HYPERVISOR_set_segment_base(9, 0), -XEN_EINVAL, "an unknown base: EINVAL");
    same(HYPERVISOR_set_segment_base(SEGBASE_FS, 1ul << 63), -XEN_EINVAL, "a base that is not canonical: EINVAL");
}

#define OWN_CS (1 << 3 | 3)
static uint64_t own_gdt[512] PAGE_ALIGNED;

/* A hypercall made with a code segment of the guest's own. */
static void own_code_segment(void)
{
    own_gdt[1] = 0x00affb000000ffff; /* 64-bit code, DPL 3 */
    uint64_t frame = virt_to_mfn(own_gdt);
    same(set_pte(own_gdt, frame << PAGE_SHIFT | PTE_RO), 0, "make a descriptor table read-only");
    same(hypercall(__HYPERVISOR_set_gdt, &frame, 512, 0, 0), 0, "set_gdt");
    unsigned before, after;
    long rc;
    __asm__ volatile("push %[own]; lea 1f(%%rip), %%rax; push %%rax; lretq; 1: mov %%cs, %[before]; mov %[nr], %%eax; xor %%edi, %%edi; syscall;"
                     "mov %%cs, %[after]; push %[flat]; lea 2f(%%rip), %%rcx; push %%rcx; lretq; 2:"
                     : "=&a"(rc), [before] "=&r"(before), [after] "=&r"(after)
                     : [own] "i"(OWN_CS), [flat] "i"(FLAT_RING3_CS64), [nr] "i"(__HYPERVISOR_xen_version)
                     : "rdi", "rsi", "rdx", "rcx", "r11", "memory");
    same(before, OWN_CS, "code runs with a selector of the guest's own");
    same(rc >> 16, 4, "a hypercall works there");
    same(after, FLAT_RING3_CS64, "and comes back with Xen's flat selector");
}

void program(void)
{
    kernel_exceptions();
    returning();
    page_faults();
    privileged();
    user_tables();
    user_mode();
    segment_bases();
    own_code_segment();
}
