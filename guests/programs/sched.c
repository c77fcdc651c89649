/* sched_op and vcpu_op: yield, block, poll with a timeout, the watchdog, and what is refused. */
#include <guest.h>

const char program_name[] = "sched";

static volatile bool woken;
static void wake(evtchn_port_t port) { (void)port; woken = true; }

static long poll(evtchn_port_t *ports, unsigned count, uint64_t timeout)
{
    struct sched_poll p = {.nr_ports = count, .timeout = timeout};
    set_xen_guest_handle(p.ports, ports);
    return HYPERVISOR_sched_op(SCHEDOP_poll, &p);
}

static void blocking(void)
{
    same(HYPERVISOR_sched_op(SCHEDOP_yield, NULL), 0, "yield");
    long timer = bind_virq(VIRQ_TIMER);
    HYPERVISOR_vcpu_op(VCPUOP_stop_periodic_timer, 0, NULL);
    on_port(timer, wake);
    port_clear(timer);
    port_unmask(timer);
    uint64_t until = system_time() + 20000000;
    events_off();
    woken = false;
    HYPERVISOR_set_timer_op(until);
    same(HYPERVISOR_sched_op(SCHEDOP_block, NULL), 0, "block with events off and a timer in 20 ms");
    ok(system_time() >= until, "sleeps until it fires");
    ok(woken, "the event was delivered");
    same(vcpu0->evtchn_upcall_mask, 0, "block turns events on");
    HYPERVISOR_set_timer_op(0);

    struct evtchn_bind_ipi ipi = {.vcpu = 0};
    HYPERVISOR_event_channel_op(EVTCHNOP_bind_ipi, &ipi);
    evtchn_port_t port = ipi.port;
    until = system_time() + 20000000;
    same(poll(&port, 1, until), 0, "poll of a quiet port for 20 ms");
    ok(system_time() >= until, "takes that long");
    notify(port);
    until = system_time() + 5000000000;
    same(poll(&port, 1, until), 0, "poll of a pending (masked) port");
    ok(system_time() < until - 4000000000, "comes back at once");
    port_clear(port);
    until = system_time() - 1000000;
    same(poll(&port, 1, until), 0, "poll with a timeout in the past");
    evtchn_port_t many[200];
    for (unsigned i = 0; i < 200; i++)
        many[i] = port;
    same(poll(many, 200, 0), -XEN_EINVAL, "poll of more than 128 ports: EINVAL");
    many[0] = 0x7fffffff;
    same(poll(many, 1, 1), -XEN_EINVAL, "poll of a port out of range: EINVAL");
    many[0] = 3000;
    same(poll(many, 1, 1), -XEN_EINVAL, "poll of a port beyond those that were ever allocated: EINVAL");
    many[0] = 60;
    same(poll(many, 1, 1), 0, "poll of one among them that is closed");
    same(poll((evtchn_port_t *)0x1000, 1, 1), -XEN_EFAULT, "poll of ports that are not mapped: EFAULT");
}

static void watchdog(void)
{
    struct sched_watchdog dog = {.id = 0, .timeout = 1000};
    long id = HYPERVISOR_sched_op(SCHEDOP_watchdog, &dog);
    ok(id >= 1 && id <= 2, "a watchdog of 1000 s gets a number (%ld)", id);
    dog.id = id;
    same(HYPERVISOR_sched_op(SCHEDOP_watchdog, &dog), 0, "set it again");
    dog.id = 0;
    long second = HYPERVISOR_sched_op(SCHEDOP_watchdog, &dog);
    ok(second >= 1 && second != id, "a second one");
    /* Xen 4.17 gives this error in the low 32 bits only. */
    same((int)HYPERVISOR_sched_op(SCHEDOP_watchdog, &dog), -XEN_ENOSPC, "there is no third: ENOSPC");
    dog.timeout = 0;
    dog.id = 77;
    same(HYPERVISOR_sched_op(SCHEDOP_watchdog, &dog), -XEN_EINVAL, "one of another number: EINVAL");
    dog.id = id;
    same(HYPERVISOR_sched_op(SCHEDOP_watchdog, &dog), 0, "stop the first");
    same(HYPERVISOR_sched_op(SCHEDOP_watchdog, &dog), -XEN_EINVAL, "stop it again: EINVAL");
    dog.id = second;
    same(HYPERVISOR_sched_op(SCHEDOP_watchdog, &dog), 0, "stop the second");
}

static void refusals(void)
{
    same(HYPERVISOR_sched_op(77, NULL), -XEN_ENOSYS, "an unknown command: ENOSYS");
    same(HYPERVISOR_sched_op(SCHEDOP_shutdown, (void *)0x1000), -XEN_EFAULT, "arguments that are not mapped: EFAULT");
    struct sched_remote_shutdown remote = {.domain_id = 0x7123, .reason = SHUTDOWN_crash};
    same(HYPERVISOR_sched_op(SCHEDOP_remote_shutdown, &remote), -XEN_ESRCH, "shut down a domain that is not there: ESRCH");
    if (is_initial_domain())
        skip("shut down another domain", "the initial domain may");
    else {
        remote.domain_id = 0;
        same(HYPERVISOR_sched_op(SCHEDOP_remote_shutdown, &remote), -XEN_EPERM, "shut down domain 0: EPERM");
    }
}

static void vcpus(void)
{
    same(HYPERVISOR_vcpu_op(VCPUOP_is_up, 0, NULL), 1, "vCPU 0 is up");
    same(HYPERVISOR_vcpu_op(VCPUOP_is_up, 99, NULL), -XEN_ENOENT, "vCPU 99 is not there: ENOENT");
    same(HYPERVISOR_vcpu_op(VCPUOP_is_up, 0x7fffffff, NULL), -XEN_ENOENT, "nor one out of range: ENOENT");
    same(HYPERVISOR_vcpu_op(77, 0, NULL), -XEN_ENOSYS, "an unknown command: ENOSYS");
    same(HYPERVISOR_vcpu_op(VCPUOP_up, 0, NULL), 0, "up of a vCPU that is up");
    same(HYPERVISOR_vcpu_op(VCPUOP_get_runstate_info, 0, (void *)0x1000), -XEN_EFAULT, "arguments that are not mapped: EFAULT");
}

void program(void)
{
    blocking();
    watchdog();
    refusals();
    vcpus();
}
