/* Debug registers and data breakpoints: first values, when a write of DR7 takes effect, I/O breakpoints that are kept but not armed, and
 * the #DB of MOV SS, which comes behind the next instruction, or not at all where that one enters Xen. */
#include <bytes.h>

const char program_name[] = "breakpoints";

#define DR6_FIRST 0xffff0ff0
#define DR7_FIRST 0x400ul
#define CR4_DE 8ul
#define LOCAL 1ul
#define GLOBAL 2ul
#define GLOBAL_EXACT 0x200ul
#define IO 2ul
#define ACCESS 3ul
#define FOUR_BYTES 3ul
#define WATCH (GLOBAL | ACCESS << 16 | FOUR_BYTES << 18 | DR7_FIRST)
#define IO_0 (GLOBAL | IO << 16 | FOUR_BYTES << 18 | GLOBAL_EXACT | DR7_FIRST)
#define IO_1 (GLOBAL << 2 | IO << 20 | FOUR_BYTES << 22 | DR7_FIRST)

static uint64_t read_by(const char *bytes)
{
    ok(kernel(bytes, 3, 0) == -1, "MOV from a register of the debugger, or of control");
    return regs.rax;
}
#define DR0 "\x0f\x21\xc0"
#define DR1 "\x0f\x21\xc8"
#define DR2 "\x0f\x21\xd0"
#define DR3 "\x0f\x21\xd8"
#define DR6 "\x0f\x21\xf0"
#define DR7 "\x0f\x21\xf8"
#define CR4 "\x0f\x20\xe0"

static void set_dr0(const void *address) { KERNEL("\x0f\x23\xc0", (uint64_t)address); }
static void set_dr6(uint64_t value) { KERNEL("\x0f\x23\xf0", value); }
static void set_dr7(uint64_t value) { KERNEL("\x0f\x23\xf8", value); }
static void set_cr4(uint64_t value) { KERNEL("\x0f\x22\xe0", value); }

static void first_values(void)
{
    same(read_by(DR0), 0, "DR0 at first");
    same(read_by(DR1), 0, "DR1");
    same(read_by(DR2), 0, "DR2");
    same(read_by(DR3), 0, "DR3");
    same(read_by(DR6), DR6_FIRST, "DR6");
    same(read_by(DR7), DR7_FIRST, "DR7");
    same(read_by(CR4) & CR4_DE, 0, "CR4.DE");
    same(KERNEL("\xb9\xd9\x01\x00\x00\x0f\x32", 0), -1, "RDMSR of DEBUGCTL");
    same(regs.rax | regs.rdx, 0, "is 0");
}

static void one_write_is_enough(void)
{
    set_dr7(0);
    set_dr7(0);
    set_dr0(data);
    for (unsigned i = 0; i < 10; i++) {
        /* mov dr7, rax; mov dword [rbx], 0 */
        same(KERNEL("\x0f\x23\xf8\xc7\x03\x00\x00\x00\x00\x90", WATCH | GLOBAL_EXACT), 1, "the instruction behind MOV to DR7 hits");
        same(caught.rip - (uint64_t)code, 9, "RIP behind it");
        set_dr7(0);
        set_dr7(0);
    }
    same(read_by(DR6) & 0xf, 1, "DR6 tells which");
    same(KERNEL("\xc7\x03\x00\x00\x00\x00", 0), -1, "disarmed, it does not");
    set_dr0(NULL);
    set_dr6(DR6_FIRST);
}

static void io_breakpoints(void)
{
    uint64_t cr4 = read_by(CR4);
    set_cr4(cr4 | CR4_DE);
    set_dr7(IO_0);
    same(read_by(DR7), IO_0, "an I/O breakpoint of DR0 is kept");
    set_dr7(IO_1);
    same(read_by(DR7), IO_1, "it goes with the next write");
    set_dr7(IO_0);
    set_cr4(cr4);
    same(KERNEL("\x0f\x23\xf8", IO_0), 13, "without CR4.DE one is #GP");
    same(caught.error, 0, "error code 0");
    same(read_by(DR7), IO_0, "and what was set stays");
    set_dr7(DR7_FIRST);
}

static void stack_segments(void)
{
    data[0] = FLAT_KERNEL_SS;
    set_dr0(data);
    set_dr7(WATCH | LOCAL);
    same(KERNEL("\x8b\x03\x90\x90", 0), 1, "a load of watched memory in the kernel");
    same(caught.rip - (uint64_t)code, 2, "#DB behind it");
    same(KERNEL("\x8e\x13\x90\x90", 0), 1, "MOV to SS of watched memory");
    same(caught.rip - (uint64_t)code, 3, "#DB behind the next instruction");
    same(KERNEL("\x8e\x13\x0f\xa2\x90", 0), 1, "before CPUID");
    same(caught.rip - (uint64_t)code, 4, "behind that");
    same(KERNEL("\x8e\x13\x0f\x0b", 0), 6, "before UD2: #UD alone");
    set_dr7(0);

    *(uint64_t *)(user_stack + 64) = FLAT_USER_SS;
    set_dr0((void *)(USER_STACK + 64));
    set_dr7(WATCH | LOCAL);
    same(USER("\x8e\x13\x90\x90", 0), 1, "MOV to SS of watched memory in user mode");
    same(caught.rip, USER_CODE + 3, "#DB behind the next instruction");
    set_dr6(DR6_FIRST);
    same(USER("\x8e\x13", 0), NOTHING, "before SYSCALL: no #DB for the guest");
    same(caught.rip, USER_CODE + 4, "RIP behind SYSCALL");
    same(USER("\x8e\x13\xcd\x20", 0), 13, "before an INT without a gate: #GP alone");
    /* push 0xe023; push 32-bit code; retfq; there: mov ss, [ebx]; syscall */
    same(USER("\x68\x23\xe0\x00\x00\x68\x0c\x00\x40\x00\x48\xcb\x8e\x13\x0f\x05", 0), 6, "before SYSCALL of 32-bit code: #UD alone");
    same(caught.rip, USER_CODE + 14, "RIP at it");
    same(caught.cs & 0xffff, FLAT_USER_CS32, "in 32-bit code");
    set_dr7(0);
    same(read_by(DR6) & 0xf, 0, "DR6 shows nothing of those");
}

void program(void)
{
    bytes_init();
    first_values();
    one_write_is_enough();
    io_breakpoints();
    stack_segments();
}
