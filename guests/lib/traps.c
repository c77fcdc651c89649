/* Trap table, callbacks, and code that is run with its faults caught. */
#include <guest.h>

extern void (*const trap_entries[32])(void);
extern void trap_128(void), event_entry(void), syscall_entry(void), failsafe_entry(void);
extern bool guarded_call(void (*body)(unsigned long), unsigned long argument);

static trap_handler_t handlers[256];
trap_handler_t on_event, on_syscall;
struct frame caught;
static bool guarded;

void on_trap(unsigned vector, trap_handler_t handler) { handlers[vector & 255] = handler; }

/* Make the frame return behind guarded_call, in the kernel, whatever mode it came from. */
void resume_kernel(struct frame *frame)
{
    guarded = false;
    frame->rip = (uint64_t)trap_resume;
    frame->cs = (frame->cs & ~0xfffful) | (FLAT_KERNEL_CS & ~3);
    frame->ss = FLAT_KERNEL_SS;
    frame->rsp = (uint64_t)frame;
    frame->rflags &= ~0x44500ul; /* TF, DF, NT, AC: the guarded code's own */
}

void trap_entry(struct frame *frame)
{
    if (frame->vector == VECTOR_EVENT && on_event) {
        on_event(frame);
        return;
    }
    if (frame->vector == VECTOR_SYSCALL && on_syscall) {
        on_syscall(frame);
        return;
    }
    if (frame->vector < 256 && handlers[frame->vector]) {
        handlers[frame->vector](frame);
        return;
    }
    if (guarded) {
        caught = *frame;
        resume_kernel(frame);
        return;
    }
    print("Bail out! trap 0x%lx error 0x%lx at 0x%lx, rsp 0x%lx, cr2 0x%lx\n", frame->vector, frame->error, frame->rip,
          frame->rsp, vcpu0->arch.cr2);
    shutdown(SHUTDOWN_crash);
}

int attempt(void (*body)(unsigned long), unsigned long argument)
{
    guarded = true;
    bool clean = guarded_call(body, argument);
    guarded = false;
    return clean ? -1 : (int)caught.vector;
}

void traps_init(void)
{
    static trap_info_t table[34];
    for (unsigned i = 0; i < 32; i++) {
        /* Breakpoint, overflow and int 0x80 may be raised from user mode by INT. */
        table[i].vector = i;
        table[i].flags = i == 3 || i == 4 ? 3 : 0;
        table[i].cs = FLAT_KERNEL_CS;
        table[i].address = (unsigned long)trap_entries[i];
    }
    table[32].vector = 0x80;
    table[32].flags = 3 | 4; /* DPL 3; events off at entry */
    table[32].cs = FLAT_KERNEL_CS;
    table[32].address = (unsigned long)trap_128;
    HYPERVISOR_set_trap_table(table);
    HYPERVISOR_set_callbacks(event_entry, failsafe_entry, syscall_entry);
}

void events_off(void)
{
    *(volatile uint8_t *)&vcpu0->evtchn_upcall_mask = 1;
    barrier();
}

void events_on(void)
{
    barrier();
    *(volatile uint8_t *)&vcpu0->evtchn_upcall_mask = 0;
    barrier();
    if (*(volatile uint8_t *)&vcpu0->evtchn_upcall_pending)
        HYPERVISOR_xen_version(XENVER_version, NULL); /* any hypercall delivers what is pending */
}
