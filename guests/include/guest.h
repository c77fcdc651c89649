/* The conformance guests' library: hypercalls, console, TAP output, traps, events, memory. One vCPU, no locks. */
#ifndef GUEST_H
#define GUEST_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Xen's public headers, from the package libxen-dev. */
#include <xen/xen.h>
#include <xen/callback.h>
#include <xen/event_channel.h>
#include <xen/features.h>
#include <xen/grant_table.h>
#include <xen/io/console.h>
#include <xen/io/xs_wire.h>
#include <xen/memory.h>
#include <xen/sched.h>
#include <xen/vcpu.h>
#include <xen/version.h>

/* errno values as Xen returns them (negated). */
#define XEN_ERRNO(name, value) XEN_##name = value,
enum {
#include <xen/errno.h>
};

#define PAGE_SHIFT 12
#define PAGE_SIZE 4096ul
#define PTE_P 1ul
#define PTE_W 2ul
#define PTE_U 4ul
#define PTE_A 0x20ul
#define PTE_D 0x40ul
#define PTE_PS 0x80ul
#define PTE_FRAME 0x000ffffffffff000ul
#define PTE_RO (PTE_P | PTE_U | PTE_A)
#define PTE_RW (PTE_RO | PTE_W | PTE_D)
#define PAGE_ALIGNED __attribute__((aligned(4096)))
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))
#define barrier() __asm__ volatile("" ::: "memory")

/* --- start.S, traps.S --- */
extern char hypercall_page[];
extern char _text[], _end[];

/* --- hypercall.h style: number, then up to five arguments; the result is Xen's. --- */
static inline long hypercall5(unsigned nr, unsigned long a, unsigned long b, unsigned long c, unsigned long d,
                              unsigned long e)
{
    register unsigned long r10 __asm__("r10") = d;
    register unsigned long r8 __asm__("r8") = e;
    unsigned long target = (unsigned long)hypercall_page + nr * 32ul;
    long result;
    __asm__ volatile("call *%[target]"
                     : "=a"(result), "+D"(a), "+S"(b), "+d"(c), "+r"(r10), "+r"(r8)
                     : [target] "0"(target)
                     : "memory", "cc");
    return result;
}
#define hypercall(nr, a, b, c, d)                                                                                  \
    hypercall5(nr, (unsigned long)(a), (unsigned long)(b), (unsigned long)(c), (unsigned long)(d), 0)

#define HYPERVISOR_set_trap_table(t) hypercall(__HYPERVISOR_set_trap_table, t, 0, 0, 0)
#define HYPERVISOR_mmu_update(r, n, done, dom) hypercall(__HYPERVISOR_mmu_update, r, n, done, dom)
#define HYPERVISOR_stack_switch(ss, sp) hypercall(__HYPERVISOR_stack_switch, ss, sp, 0, 0)
#define HYPERVISOR_set_callbacks(e, f, s) hypercall(__HYPERVISOR_set_callbacks, e, f, s, 0)
#define HYPERVISOR_memory_op(cmd, p) hypercall(__HYPERVISOR_memory_op, cmd, p, 0, 0)
#define HYPERVISOR_multicall(c, n) hypercall(__HYPERVISOR_multicall, c, n, 0, 0)
#define HYPERVISOR_update_va_mapping(va, pte, fl) hypercall(__HYPERVISOR_update_va_mapping, va, pte, fl, 0)
#define HYPERVISOR_set_timer_op(t) hypercall(__HYPERVISOR_set_timer_op, t, 0, 0, 0)
#define HYPERVISOR_xen_version(cmd, p) hypercall(__HYPERVISOR_xen_version, cmd, p, 0, 0)
#define HYPERVISOR_console_io(cmd, n, p) hypercall(__HYPERVISOR_console_io, cmd, n, p, 0)
#define HYPERVISOR_grant_table_op(cmd, p, n) hypercall(__HYPERVISOR_grant_table_op, cmd, p, n, 0)
#define HYPERVISOR_vm_assist(cmd, t) hypercall(__HYPERVISOR_vm_assist, cmd, t, 0, 0)
#define HYPERVISOR_vcpu_op(cmd, v, p) hypercall(__HYPERVISOR_vcpu_op, cmd, v, p, 0)
#define HYPERVISOR_set_segment_base(w, b) hypercall(__HYPERVISOR_set_segment_base, w, b, 0, 0)
#define HYPERVISOR_mmuext_op(o, n, done, dom) hypercall(__HYPERVISOR_mmuext_op, o, n, done, dom)
#define HYPERVISOR_sched_op(cmd, p) hypercall(__HYPERVISOR_sched_op, cmd, p, 0, 0)
#define HYPERVISOR_callback_op(cmd, p) hypercall(__HYPERVISOR_callback_op, cmd, p, 0, 0)
#define HYPERVISOR_event_channel_op(cmd, p) hypercall(__HYPERVISOR_event_channel_op, cmd, p, 0, 0)

/* --- machine.c --- */
extern start_info_t *start_info;
extern shared_info_t *shared_info;
#define vcpu0 (&shared_info->vcpu_info[0])

static inline bool is_initial_domain(void) { return start_info->flags & SIF_INITDOMAIN; }
static inline unsigned long *p2m(void) { return (unsigned long *)start_info->mfn_list; }
unsigned long virt_to_pfn(const void *va);
unsigned long virt_to_mfn(const void *va);
/* Machine address of the level 1 entry that maps `va`; 0 if a table is missing. */
uint64_t pte_machine_address(const void *va);
/* The entry itself, by reading the (read-only mapped) tables. */
uint64_t read_pte(const void *va);
/* Change the mapping of a page of the image; the result is the hypercall's. */
long set_pte(const void *va, uint64_t pte);
/* The virtual address at which the initial mapping shows a frame of the guest, or NULL. */
void *mfn_to_virt(unsigned long mfn);
uint64_t system_time(void);
uint64_t rdtsc(void);
uint64_t time_of(const vcpu_time_info_t *source);
void shutdown(unsigned reason) __attribute__((noreturn));

/* --- string.c --- */
void *memset(void *d, int c, size_t n);
void *memcpy(void *d, const void *s, size_t n);
int memcmp(const void *a, const void *b, size_t n);
size_t strlen(const char *s);
int strcmp(const char *a, const char *b);
/* %s %c %d %u %x %lx %ld %lu %p %% with a width and zero filling. Always closed with a zero; the length it would need. */
int format(char *out, size_t room, const char *text, va_list args);

/* --- console.c --- */
/* Output goes to the hypervisor's log: nobody reads the ring. */
extern bool console_direct;
void console_write(const char *data, size_t size);
void console_flush(void);
void print(const char *text, ...) __attribute__((format(printf, 1, 2)));

/* --- tap.c --- */
/* One line "ok N - what" or "not ok N - what". */
void ok(bool passed, const char *what, ...) __attribute__((format(printf, 2, 3)));
/* As `ok(got == want)`; a failure tells both values. */
void same(long got, long want, const char *what, ...) __attribute__((format(printf, 3, 4)));
/* "ok N - what # SKIP why" */
void skip(const char *what, const char *why);
void note(const char *text, ...) __attribute__((format(printf, 1, 2)));
/* "1..N", then power off. */
void finish(void) __attribute__((noreturn));

/* --- traps.c --- */
struct frame {
    uint64_t r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi;
    uint64_t vector, error;
    uint64_t rip, cs, rflags, rsp, ss;
};
#define VECTOR_EVENT 0x100
#define VECTOR_SYSCALL 0x101
#define VECTOR_FAILSAFE 0x102
typedef void (*trap_handler_t)(struct frame *frame);
/* Install the trap table and callbacks. */
void traps_init(void);
void on_trap(unsigned vector, trap_handler_t handler);
extern trap_handler_t on_event, on_syscall;
/* Run code that may fault: the vector that hit (-1: none) and the frame then. Continues behind the faulting code. */
extern struct frame caught;
extern char trap_resume[];
/* From a handler: continue behind `attempt`, as if its code had ended. */
void resume_kernel(struct frame *frame);
/* Load all registers from a frame and go there by Xen's iret. */
void enter_frame(struct frame *frame) __attribute__((noreturn));
int attempt(void (*body)(unsigned long), unsigned long argument);
/* Mask or unmask event delivery to this vCPU; unmasking delivers what is pending. */
void events_off(void);
void events_on(void);

/* --- events.c --- */
#define MAX_PORTS 4096
typedef void (*event_handler_t)(evtchn_port_t port);
void events_init(void);
void on_port(evtchn_port_t port, event_handler_t handler);
bool port_pending(evtchn_port_t port);
bool port_masked(evtchn_port_t port);
void port_mask(evtchn_port_t port);
long port_unmask(evtchn_port_t port);
void port_clear(evtchn_port_t port);
long notify(evtchn_port_t port);
/* Bind a virtual IRQ of vCPU 0; the port or a negative errno. */
long bind_virq(unsigned virq);
/* Block until `*flag` or until `ns` have passed; true if the flag was set. */
bool wait_for(volatile bool *flag, uint64_t ns);

/* --- xenstore.c --- */
/* One request with its reply: the value's length, or a negative errno as xenstored named it. Waits at most a second. */
long xenstore_read(const char *path, char *value, size_t room);
long xenstore_write(const char *path, const char *value);
/* For clients of their own: bytes through the ring (false: the deadline has passed), and the number of an error's name. */
bool xenstore_send(const void *data, size_t size, uint64_t deadline);
bool xenstore_receive(void *data, size_t size, uint64_t deadline);
int xenstore_error(const char *name);
/* How these wait for the other end, until that time at most. */
extern void (*xenstore_wait)(uint64_t until);

/* Each program has one. */
extern const char program_name[];
void program(void);

#endif
