/* Event channels of one domain with itself, virtual IRQs, IPIs, masking, and the timers that raise events. */
#include <guest.h>

const char program_name[] = "events";

static volatile unsigned hits[64];
static void count(evtchn_port_t port) { hits[port % 64]++; }

static long status(evtchn_port_t port, struct evtchn_status *s)
{
    memset(s, 0, sizeof(*s));
    s->dom = DOMID_SELF;
    s->port = port;
    return HYPERVISOR_event_channel_op(EVTCHNOP_status, s);
}

static long close_port(evtchn_port_t port)
{
    struct evtchn_close op = {.port = port};
    return HYPERVISOR_event_channel_op(EVTCHNOP_close, &op);
}

static evtchn_port_t alloc(void)
{
    struct evtchn_alloc_unbound op = {.dom = DOMID_SELF, .remote_dom = DOMID_SELF};
    same(HYPERVISOR_event_channel_op(EVTCHNOP_alloc_unbound, &op), 0, "alloc_unbound for itself");
    ok(op.port > 0 && op.port < MAX_PORTS, "gives a port");
    return op.port;
}

static void interdomain(void)
{
    struct evtchn_status s;
    evtchn_port_t left = alloc();
    same(status(left, &s), 0, "status of the unbound port");
    same(s.status, EVTCHNSTAT_unbound, "is unbound");
    domid_t self = s.u.unbound.dom;
    same(notify(left), 0, "a send on an unbound port is dropped without an error");
    struct evtchn_bind_interdomain bind = {.remote_dom = DOMID_SELF, .remote_port = left};
    same(HYPERVISOR_event_channel_op(EVTCHNOP_bind_interdomain, &bind), 0, "bind_interdomain to it");
    evtchn_port_t right = bind.local_port;
    ok(right != left, "gives another port");
    ok(port_pending(right), "which is pending at once, in case a send was missed");
    port_clear(right);
    same(status(left, &s), 0, "status of the first port");
    same(s.status, EVTCHNSTAT_interdomain, "is interdomain");
    same(s.u.interdomain.port, right, "with the second as its peer");
    same(s.u.interdomain.dom, self, "of the same domain");
    same(HYPERVISOR_event_channel_op(EVTCHNOP_bind_interdomain, &bind), -XEN_EINVAL, "a bound port is not bound again: EINVAL");

    on_port(left, count);
    same(notify(right), 0, "send while masked");
    ok(port_pending(left) && !port_pending(right), "makes the peer pending, and only it");
    same(hits[left % 64], 0, "and calls nobody");
    same(port_unmask(left), 0, "unmask");
    same(hits[left % 64], 1, "delivers what was pending");
    ok(!port_pending(left), "the handler cleared it");
    same(notify(right), 0, "send while unmasked");
    same(hits[left % 64], 2, "is delivered before the hypercall is over");
    events_off();
    notify(right);
    notify(right);
    same(hits[left % 64], 2, "not while the upcall mask is set");
    ok(vcpu0->evtchn_upcall_pending, "but the upcall is pending");
    ok(vcpu0->evtchn_pending_sel >> left / 64 & 1, "with its word selected");
    events_on();
    same(hits[left % 64], 3, "two sends while pending are one event");
    port_mask(left);
    notify(right);
    same(hits[left % 64], 3, "a masked port calls nobody");
    port_clear(left);

    struct evtchn_bind_vcpu vcpu = {.port = left, .vcpu = 0};
    same(HYPERVISOR_event_channel_op(EVTCHNOP_bind_vcpu, &vcpu), 0, "bind_vcpu to vCPU 0");
    vcpu.vcpu = 99;
    same(HYPERVISOR_event_channel_op(EVTCHNOP_bind_vcpu, &vcpu), -XEN_ENOENT, "bind_vcpu to a vCPU that is not there: ENOENT");
    struct evtchn_set_priority priority = {.port = left, .priority = 3};
    same(HYPERVISOR_event_channel_op(EVTCHNOP_set_priority, &priority), -XEN_ENOSYS, "no priorities with 2-level events: ENOSYS");

    same(close_port(right), 0, "close the second port");
    same(status(right, &s), 0, "its status");
    same(s.status, EVTCHNSTAT_closed, "is closed");
    same(status(left, &s), 0, "the status of its peer");
    same(s.status, EVTCHNSTAT_unbound, "is unbound again");
    same(notify(right), -XEN_EINVAL, "send on a closed port: EINVAL");
    same(close_port(right), -XEN_EINVAL, "close of a closed port: EINVAL");
    same(close_port(left), 0, "close the first");
}

static void errors(void)
{
    struct evtchn_status s;
    same(notify(0), -XEN_EINVAL, "send on port 0: EINVAL");
    same(notify(MAX_PORTS - 1), -XEN_EINVAL, "send on a port never allocated: EINVAL");
    same(notify(0x7fffffff), -XEN_EINVAL, "send on a port out of range: EINVAL");
    same(close_port(0x7fffffff), -XEN_EINVAL, "close out of range: EINVAL");
    same(close_port(0), -XEN_EINVAL, "close of port 0: EINVAL");
    same(status(0x7fffffff, &s), -XEN_EINVAL, "status out of range: EINVAL");
    same(status(3000, &s), -XEN_EINVAL, "of a port beyond those that were ever allocated: EINVAL");
    same(status(60, &s), 0, "of one among them that is closed");
    same(port_unmask(0x7fffffff), -XEN_EINVAL, "unmask out of range: EINVAL");
    same(HYPERVISOR_event_channel_op(77, &s), -XEN_ENOSYS, "an unknown command: ENOSYS");
    same(HYPERVISOR_event_channel_op(EVTCHNOP_send, (void *)0x1000), -XEN_EFAULT, "arguments that are not mapped: EFAULT");
    struct evtchn_bind_interdomain bind = {.remote_dom = 0x7123, .remote_port = 1};
    same(HYPERVISOR_event_channel_op(EVTCHNOP_bind_interdomain, &bind), -XEN_ESRCH, "bind to a domain that is not there: ESRCH");
    bind = (struct evtchn_bind_interdomain){.remote_dom = DOMID_SELF, .remote_port = 0x7fffffff};
    same(HYPERVISOR_event_channel_op(EVTCHNOP_bind_interdomain, &bind), -XEN_EINVAL, "bind to a port out of range: EINVAL");
    struct evtchn_alloc_unbound alloc_for = {.dom = 0x7123, .remote_dom = DOMID_SELF};
    same(HYPERVISOR_event_channel_op(EVTCHNOP_alloc_unbound, &alloc_for), -XEN_ESRCH, "alloc_unbound in a domain that is not there: ESRCH");
}

static void ipi(void)
{
    struct evtchn_bind_ipi op = {.vcpu = 0};
    struct evtchn_status s;
    same(HYPERVISOR_event_channel_op(EVTCHNOP_bind_ipi, &op), 0, "bind_ipi");
    on_port(op.port, count);
    same(status(op.port, &s), 0, "its status");
    same(s.status, EVTCHNSTAT_ipi, "is ipi");
    same(s.vcpu, 0, "of vCPU 0");
    unsigned before = hits[op.port % 64];
    port_unmask(op.port);
    same(notify(op.port), 0, "send it");
    same(hits[op.port % 64] - before, 1, "it comes to the sender");
    struct evtchn_bind_vcpu vcpu = {.port = op.port, .vcpu = 0};
    same(HYPERVISOR_event_channel_op(EVTCHNOP_bind_vcpu, &vcpu), -XEN_EINVAL, "an IPI cannot be moved: EINVAL");
    port_mask(op.port);
    same(close_port(op.port), 0, "close it");
    op.vcpu = 99;
    same(HYPERVISOR_event_channel_op(EVTCHNOP_bind_ipi, &op), -XEN_ENOENT, "an IPI for a vCPU that is not there: ENOENT");
}

static volatile bool ticked;
static volatile unsigned ticks;
static volatile uint64_t tick_time;
static void tick(evtchn_port_t port)
{
    (void)port;
    ticked = true;
    ticks++;
    tick_time = system_time();
}

static void spin_until(uint64_t when)
{
    while (system_time() < when)
        barrier();
}

static void timers(void)
{
    struct evtchn_status s;
    long port = bind_virq(VIRQ_TIMER);
    ok(port > 0, "bind_virq VIRQ_TIMER");
    same(status(port, &s), 0, "its status");
    ok(s.status == EVTCHNSTAT_virq && s.u.virq == VIRQ_TIMER, "is virq, VIRQ_TIMER");
    same(bind_virq(VIRQ_TIMER), -XEN_EEXIST, "bind it again: EEXIST");
    same(bind_virq(NR_VIRQS), -XEN_EINVAL, "bind a virq out of range: EINVAL");
    struct evtchn_bind_virq far = {.virq = VIRQ_TIMER, .vcpu = 99};
    same(HYPERVISOR_event_channel_op(EVTCHNOP_bind_virq, &far), -XEN_ENOENT, "for a vCPU that is not there: ENOENT");
    far = (struct evtchn_bind_virq){.virq = VIRQ_CONSOLE, .vcpu = 1};
    same(HYPERVISOR_event_channel_op(EVTCHNOP_bind_virq, &far), -XEN_EINVAL, "a global virq on another vCPU than 0: EINVAL");
    same(notify(port), -XEN_EINVAL, "a guest cannot send a virq: EINVAL");
    on_port(port, tick);
    port_clear(port);
    port_unmask(port);

    spin_until(system_time() + 100000000);
    ok(ticks >= 3 && ticks <= 12, "a PV guest starts with a ticker of 100 Hz (%u in 100 ms)", ticks);
    same(HYPERVISOR_vcpu_op(VCPUOP_stop_periodic_timer, 0, NULL), 0, "stop it");

    struct vcpu_set_singleshot_timer shot = {.timeout_abs_ns = system_time() + 5000000, .flags = 0};
    ticked = false;
    same(HYPERVISOR_vcpu_op(VCPUOP_set_singleshot_timer, 0, &shot), 0, "single-shot timer in 5 ms");
    ok(wait_for(&ticked, 2000000000) && tick_time >= shot.timeout_abs_ns, "comes, and not early");
    ticked = false;
    shot.timeout_abs_ns = system_time() + 3000000;
    HYPERVISOR_vcpu_op(VCPUOP_set_singleshot_timer, 0, &shot);
    uint64_t limit = system_time() + 2000000000;
    while (!ticked && system_time() < limit)
        barrier();
    ok(ticked && tick_time >= shot.timeout_abs_ns, "it interrupts a busy loop too, and not early");
    ticked = false;
    shot.timeout_abs_ns = system_time() + 3000000;
    HYPERVISOR_vcpu_op(VCPUOP_set_singleshot_timer, 0, &shot);
    same(HYPERVISOR_vcpu_op(VCPUOP_stop_singleshot_timer, 0, NULL), 0, "stop it");
    spin_until(shot.timeout_abs_ns + 10000000);
    ok(!ticked, "a stopped timer does not fire");
    shot = (struct vcpu_set_singleshot_timer){.timeout_abs_ns = system_time() - 1000000, .flags = VCPU_SSHOTTMR_future};
    ticked = false;
    same(HYPERVISOR_vcpu_op(VCPUOP_set_singleshot_timer, 0, &shot), 0, "in the past: no error, whatever the flag");
    ok(wait_for(&ticked, 1000000000), "fires at once");

    struct vcpu_set_periodic_timer period = {.period_ns = 10000000};
    ticks = 0;
    same(HYPERVISOR_vcpu_op(VCPUOP_set_periodic_timer, 0, &period), 0, "periodic timer of 10 ms");
    spin_until(system_time() + 100000000);
    ok(ticks >= 3 && ticks <= 12, "ticks about ten times in 100 ms (%u)", ticks);
    same(HYPERVISOR_vcpu_op(VCPUOP_stop_periodic_timer, 0, NULL), 0, "stop it");
    unsigned had = ticks;
    spin_until(system_time() + 30000000);
    ok(ticks <= had + 1, "no ticks after that");
    period.period_ns = 1000;
    same(HYPERVISOR_vcpu_op(VCPUOP_set_periodic_timer, 0, &period), -XEN_EINVAL, "a period under a millisecond: EINVAL");
    same(HYPERVISOR_vcpu_op(VCPUOP_set_singleshot_timer, 99, &shot), -XEN_ENOENT, "the timer of a vCPU that is not there: ENOENT");

    ticked = false;
    uint64_t when = system_time() + 5000000;
    same(HYPERVISOR_set_timer_op(when), 0, "set_timer_op in 5 ms");
    ok(wait_for(&ticked, 2000000000) && tick_time >= when, "comes, and not early");
    port_mask(port);
    same(close_port(port), 0, "close the virq");
    port = bind_virq(VIRQ_TIMER);
    ok(port > 0, "and bind it once more");
}

void program(void)
{
    interdomain();
    errors();
    ipi();
    timers();
}
