/* Code given as bytes, run in the kernel and in user mode, with its faults caught. */
#include <bytes.h>

static char l4[PAGE_SIZE] PAGE_ALIGNED, l3[PAGE_SIZE] PAGE_ALIGNED, l2[PAGE_SIZE] PAGE_ALIGNED, l1[PAGE_SIZE] PAGE_ALIGNED;
static char user_code[PAGE_SIZE] PAGE_ALIGNED;
char user_stack[PAGE_SIZE] PAGE_ALIGNED;
static char kernel_stack[8192] PAGE_ALIGNED;
char code[PAGE_SIZE] PAGE_ALIGNED;
uint64_t data[8];

static uint64_t entry(const void *page, uint64_t flags) { return (uint64_t)virt_to_mfn(page) << PAGE_SHIFT | flags; }

static void user_tables(void)
{
    ((uint64_t *)l4)[0] = entry(l3, PTE_RW);
    ((uint64_t *)l3)[0] = entry(l2, PTE_RW);
    ((uint64_t *)l2)[USER_CODE >> 21 & 511] = entry(l1, PTE_RW);
    ((uint64_t *)l1)[USER_CODE >> 12 & 511] = entry(user_code, PTE_RO);
    ((uint64_t *)l1)[USER_STACK >> 12 & 511] = entry(user_stack, PTE_RW);
    char *tables[] = {l4, l3, l2, l1};
    for (unsigned i = 0; i < 4; i++)
        set_pte(tables[i], entry(tables[i], PTE_RO));
    struct mmuext_op ops[] = {
        {.cmd = MMUEXT_PIN_L4_TABLE, .arg1.mfn = virt_to_mfn(l4)},
        {.cmd = MMUEXT_NEW_USER_BASEPTR, .arg1.mfn = virt_to_mfn(l4)},
    };
    same(HYPERVISOR_mmuext_op(ops, 2, NULL, DOMID_SELF), 0, "a user page table");
    same(HYPERVISOR_stack_switch(FLAT_KERNEL_SS, kernel_stack + sizeof(kernel_stack)), 0, "a kernel stack");
}

/* --- code bytes in the kernel: RAX, RCX, RDX go in and come out; RBX points at `data` --- */

struct bytes_regs regs;

static void in_kernel(unsigned long target)
{
    register uint64_t rax __asm__("rax") = regs.rax;
    register uint64_t rcx __asm__("rcx") = regs.rcx;
    register uint64_t rdx __asm__("rdx") = regs.rdx;
    __asm__ volatile("call *%[target]"
                     : "+r"(rax), "+r"(rcx), "+r"(rdx)
                     : [target] "D"(target), "b"(data)
                     : "memory", "cc", "rsi", "r8", "r9", "r10", "r11");
    regs.rax = rax, regs.rcx = rcx, regs.rdx = rdx;
}

/* The vector that the bytes trap with, -1 for none. */
int kernel(const char *bytes, size_t size, uint64_t rax)
{
    memset(code, 0xcc, 64);
    memcpy(code, bytes, size);
    code[size] = (char)0xc3; /* ret */
    regs.rax = rax, regs.rcx = regs.rdx = 0;
    return attempt(in_kernel, (unsigned long)code);
}

static struct frame to_user;
static void enter_user(unsigned long a) { (void)a; enter_frame(&to_user); }
static void from_syscall(struct frame *frame)
{
    caught = *frame;
    resume_kernel(frame);
}

/* The same in user mode, where SYSCALL ends the bytes: VECTOR_SYSCALL then. */
int user(const char *bytes, size_t size, uint64_t rax)
{
    memset(user_code, 0xcc, 64);
    memcpy(user_code, bytes, size);
    memcpy(user_code + size, "\x0f\x05", 2);
    memset(&to_user, 0, sizeof(to_user));
    to_user.rip = USER_CODE;
    to_user.cs = FLAT_USER_CS | 3;
    to_user.ss = FLAT_USER_SS;
    to_user.rsp = USER_STACK + 0x800;
    to_user.rbx = USER_STACK + 64;
    to_user.rflags = 0x202;
    to_user.rax = rax;
    return attempt(enter_user, 0);
}

void bytes_init(void)
{
    set_pte(code, entry(code, PTE_RW));
    on_syscall = from_syscall;
    user_tables();
}
