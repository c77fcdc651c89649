/* The console: a domU's ring (io/console.h), or console_io for the initial domain, which has no ring. */
#include <guest.h>

#define TRIES 100
#define PAUSE_NS 20000000ul

bool console_direct;

static struct xencons_interface *ring(void)
{
    return is_initial_domain() || console_direct ? NULL : mfn_to_virt(start_info->console.domU.mfn);
}

static void kick(void)
{
    struct evtchn_send send = {.port = start_info->console.domU.evtchn};
    HYPERVISOR_event_channel_op(EVTCHNOP_send, &send);
}

/* Let the other end work: sleep for a little, at most. */
static void pause_a_little(void)
{
    evtchn_port_t port = start_info->console.domU.evtchn;
    struct sched_poll poll = {.nr_ports = 1, .timeout = system_time() + PAUSE_NS};
    set_xen_guest_handle(poll.ports, &port);
    shared_info->evtchn_pending[port / 64] &= ~(1ul << port % 64);
    HYPERVISOR_sched_op(SCHEDOP_poll, &poll);
}

void console_write(const char *data, size_t size)
{
    struct xencons_interface *intf = ring();
    if (!intf) {
        HYPERVISOR_console_io(CONSOLEIO_write, size, data);
        return;
    }
    for (int tries = 0; size && tries < TRIES;) {
        XENCONS_RING_IDX cons = *(volatile XENCONS_RING_IDX *)&intf->out_cons, prod = intf->out_prod;
        if (prod - cons >= sizeof(intf->out)) { /* full: what nobody reads for two seconds is lost */
            kick();
            pause_a_little();
            tries++;
            continue;
        }
        for (; size && prod - cons < sizeof(intf->out); size--)
            intf->out[MASK_XENCONS_IDX(prod++, intf->out)] = *data++;
        barrier();
        *(volatile XENCONS_RING_IDX *)&intf->out_prod = prod;
        kick();
        tries = 0;
    }
}

void console_flush(void)
{
    struct xencons_interface *intf = ring();
    for (int tries = 0; intf && tries < TRIES; tries++) {
        if (*(volatile XENCONS_RING_IDX *)&intf->out_cons == intf->out_prod)
            return;
        kick();
        pause_a_little();
    }
}

void print(const char *text, ...)
{
    char line[512];
    va_list args;
    va_start(args, text);
    size_t size = format(line, sizeof(line), text, args);
    va_end(args);
    console_write(line, size < sizeof(line) ? size : sizeof(line) - 1);
}
