/* Event channels, 2-level. Bits in the shared info are changed with locked instructions, as the headers demand. */
#include <guest.h>

static event_handler_t port_handlers[MAX_PORTS];

static void set_bit(unsigned long *words, unsigned long bit)
{
    __asm__ volatile("lock bts %1, %0" : "+m"(words[bit / 64]) : "r"(bit % 64) : "memory", "cc");
}

static void clear_bit(unsigned long *words, unsigned long bit)
{
    __asm__ volatile("lock btr %1, %0" : "+m"(words[bit / 64]) : "r"(bit % 64) : "memory", "cc");
}

static bool test_bit(const unsigned long *words, unsigned bit)
{
    return ((const volatile unsigned long *)words)[bit / 64] >> bit % 64 & 1;
}

bool port_pending(evtchn_port_t port) { return test_bit(shared_info->evtchn_pending, port); }
bool port_masked(evtchn_port_t port) { return test_bit(shared_info->evtchn_mask, port); }
void port_mask(evtchn_port_t port) { set_bit(shared_info->evtchn_mask, port); }
void port_clear(evtchn_port_t port) { clear_bit(shared_info->evtchn_pending, port); }

long port_unmask(evtchn_port_t port)
{
    struct evtchn_unmask op = {.port = port};
    return HYPERVISOR_event_channel_op(EVTCHNOP_unmask, &op);
}

long notify(evtchn_port_t port)
{
    struct evtchn_send op = {.port = port};
    return HYPERVISOR_event_channel_op(EVTCHNOP_send, &op);
}

long bind_virq(unsigned virq)
{
    struct evtchn_bind_virq op = {.virq = virq, .vcpu = 0};
    long rc = HYPERVISOR_event_channel_op(EVTCHNOP_bind_virq, &op);
    return rc ? rc : (long)op.port;
}

void on_port(evtchn_port_t port, event_handler_t handler) { port_handlers[port] = handler; }

static void upcall(struct frame *frame)
{
    (void)frame;
    *(volatile uint8_t *)&vcpu0->evtchn_upcall_pending = 0;
    unsigned long selector = __atomic_exchange_n(&vcpu0->evtchn_pending_sel, 0, __ATOMIC_SEQ_CST);
    for (; selector; selector &= selector - 1) {
        unsigned word = __builtin_ctzl(selector);
        unsigned long ready = shared_info->evtchn_pending[word] & ~shared_info->evtchn_mask[word];
        for (; ready; ready &= ready - 1) {
            evtchn_port_t port = word * 64 + __builtin_ctzl(ready);
            port_clear(port);
            if (port_handlers[port])
                port_handlers[port](port);
        }
    }
}

void events_init(void)
{
    /* Everything masked but what a program unmasks; delivery on. */
    memset(shared_info->evtchn_mask, 0xff, sizeof(shared_info->evtchn_mask));
    on_event = upcall;
    events_on();
}

bool wait_for(volatile bool *flag, uint64_t ns)
{
    uint64_t deadline = system_time() + ns, now;
    while (!*flag) {
        if ((now = system_time()) >= deadline)
            return false;
        /* An event between the test and the poll is noticed at the poll's end, 10 ms later at most. */
        struct sched_poll poll = {.nr_ports = 0, .timeout = now + 10000000};
        HYPERVISOR_sched_op(SCHEDOP_poll, &poll);
    }
    return true;
}
