/* The paravirtual clock, the wall clock and the accounting of run states. */
#include <guest.h>

const char program_name[] = "time";

static char area[PAGE_SIZE] PAGE_ALIGNED;

/* One poll. Xen ends one without ports at any port's event, also a masked one: the console's, say. */
static uint64_t poll_for(uint64_t ns)
{
    uint64_t before = system_time();
    struct sched_poll p = {.nr_ports = 0, .timeout = before + ns};
    HYPERVISOR_sched_op(SCHEDOP_poll, &p);
    return system_time() - before;
}

static void block_for(uint64_t ns)
{
    uint64_t end = system_time() + ns;
    for (uint64_t now = system_time(); now < end; now = system_time())
        poll_for(end - now);
}

static void clock(void)
{
    uint64_t last = system_time(), first = last;
    ok(last > 0 && last < 1ull << 56, "system time is sane (%lu ns)", last);
    bool forward = true;
    for (unsigned i = 0; i < 50000; i++) {
        uint64_t now = system_time();
        forward &= now >= last;
        last = now;
    }
    ok(forward, "it never goes back in 50000 readings");
    ok(last > first, "and goes forward (%lu ns)", last - first);
    uint64_t slept = 0;
    for (unsigned tries = 0; tries < 5 && slept < 50000000; tries++)
        slept = poll_for(50000000);
    ok(slept >= 50000000, "a poll of 50 ms takes at least 50 ms of it");
    ok(slept < 5000000000, "and not a hundred times as long (%lu us)", slept / 1000);
    ok((vcpu0->time.flags & ~1u) == 0, "no unknown flags");
    ok(vcpu0->time.tsc_shift > -32 && vcpu0->time.tsc_shift < 32, "the shift is in range");
    ok(vcpu0->time.tsc_timestamp <= rdtsc(), "its time stamp is not in the future");
    ok(vcpu0->time.system_time <= system_time(), "nor is its system time");
    uint64_t a = rdtsc();
    block_for(1000000);
    ok(rdtsc() > a, "the time stamp counter goes on while blocked");
}

static void wall_clock(void)
{
    uint64_t boot = shared_info->wc_sec | (uint64_t)shared_info->wc_sec_hi << 32;
    uint64_t now = boot + (shared_info->wc_nsec + system_time()) / 1000000000;
    ok(!(shared_info->wc_version & 1), "the wall clock is not in an update");
    ok(shared_info->wc_nsec < 1000000000, "its nanoseconds are under a second");
    ok(now > 1577836800 && now < 4102444800, "it is after 2020 and before 2100 (%lu)", now);
}

static uint64_t sum(const vcpu_runstate_info_t *r) { return r->time[0] + r->time[1] + r->time[2] + r->time[3]; }

static void runstate(void)
{
    vcpu_runstate_info_t a, b;
    same(HYPERVISOR_vcpu_op(VCPUOP_get_runstate_info, 0, &a), 0, "get_runstate_info");
    same(a.state, RUNSTATE_running, "it is running");
    ok(a.state_entry_time <= system_time(), "since a time that is past");
    block_for(30000000);
    same(HYPERVISOR_vcpu_op(VCPUOP_get_runstate_info, 0, &b), 0, "get it again");
    ok(b.time[RUNSTATE_blocked] - a.time[RUNSTATE_blocked] >= 25000000, "30 ms in poll count as blocked");
    ok(b.time[RUNSTATE_running] >= a.time[RUNSTATE_running], "running time does not go back");
    ok(sum(&b) >= sum(&a) + 30000000, "the sum goes on with the clock");
    ok(sum(&b) <= system_time(), "and is no more than all time");
    same(HYPERVISOR_vcpu_op(VCPUOP_get_runstate_info, 99, &b), -XEN_ENOENT, "of a vCPU that is not there: ENOENT");

    struct vcpu_register_runstate_memory_area reg = {0};
    volatile vcpu_runstate_info_t *shown = (volatile vcpu_runstate_info_t *)area;
    memset(area, 0xff, sizeof(area));
    reg.addr.v = (void *)area;
    same(HYPERVISOR_vcpu_op(VCPUOP_register_runstate_memory_area, 0, &reg), 0, "register_runstate_memory_area");
    same(shown->state, RUNSTATE_running, "the area is filled at once");
    uint64_t blocked = shown->time[RUNSTATE_blocked];
    block_for(20000000);
    ok(shown->time[RUNSTATE_blocked] >= blocked + 15000000, "and after each change");
    same(shown->state, RUNSTATE_running, "with the state of now");
    memset(area + 2048, 0, 64);
    struct vcpu_register_time_memory_area time_area = {0};
    time_area.addr.v = (void *)(area + 2048);
    same(HYPERVISOR_vcpu_op(VCPUOP_register_vcpu_time_memory_area, 0, &time_area), 0, "register_vcpu_time_memory_area");
    block_for(1000000);
    const vcpu_time_info_t *second = (const vcpu_time_info_t *)(area + 2048);
    ok(second->tsc_to_system_mul == vcpu0->time.tsc_to_system_mul, "the second clock has the same rate");
    uint64_t x = system_time(), y = time_of(second), z = system_time();
    ok(x <= y + 1000 && y <= z + 1000, "and the same time");
}

void program(void)
{
    clock();
    wall_clock();
    runstate();
}
