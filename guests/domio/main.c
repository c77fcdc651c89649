/* Start, the loop, and what the other files need of the machine. */
#include "domio.h"

const char program_name[] = "domio";
volatile bool work;
static domid_t known_domid[MAX_PORTS];
static evtchn_port_t known_remote[MAX_PORTS];

#define UNUSED_PORTS 128      /* so many closed ports in a row: none is open behind them */
#define TICK (100 * NS_MS)
#define STARTING (2 * NS_MS)

void say(const char *text, ...)
{
    char line[256];
    va_list args;
    va_start(args, text);
    int size = format(line, sizeof(line) - 1, text, args);
    va_end(args);
    size = size < (int)sizeof(line) - 2 ? size : (int)sizeof(line) - 2;
    line[size++] = '\n';
    HYPERVISOR_console_io(CONSOLEIO_write, size, line);
}

const char *argument(const char *name)
{
    const char *text = (const char *)start_info->cmd_line;
    size_t size = strlen(name);
    while (*text) {
        if (!memcmp(text, name, size) && text[size] == '=')
            return text + size + 1;
        while (*text && *text != ' ')
            text++;
        while (*text == ' ')
            text++;
    }
    return NULL;
}

bool number(const char **text, uint64_t most, uint64_t *value)
{
    const char *at = *text;
    uint64_t found = 0;
    if (*at < '0' || *at > '9')
        return false;
    for (; *at >= '0' && *at <= '9'; at++) {
        unsigned digit = *at - '0';
        if (found > (most - digit) / 10 || digit > most)
            return false;
        found = found * 10 + digit;
    }
    *text = at;
    *value = found;
    return true;
}

void idle(uint64_t until)
{
    events_off();
    if (work) {
        events_on();
        return;
    }
    HYPERVISOR_set_timer_op(until);
    HYPERVISOR_sched_op(SCHEDOP_block, NULL); /* lets events in again */
    events_on();
}

static void wake(evtchn_port_t port)
{
    (void)port;
    work = true;
}

/* Ports of an earlier life: those that join us to frontends are kept, timers and interrupts are bound anew. */
static void find_ports(void)
{
    unsigned closed = 0;
    for (evtchn_port_t port = 1; port < MAX_PORTS && closed < UNUSED_PORTS; port++) {
        struct evtchn_status status = {.dom = DOMID_SELF, .port = port};
        if (HYPERVISOR_event_channel_op(EVTCHNOP_status, &status) || status.status == EVTCHNSTAT_closed) {
            closed++;
            continue;
        }
        closed = 0;
        if (status.status == EVTCHNSTAT_pirq || status.status == EVTCHNSTAT_virq) {
            struct evtchn_close close = {.port = port};
            HYPERVISOR_event_channel_op(EVTCHNOP_close, &close);
        } else if (status.status == EVTCHNSTAT_interdomain && port != start_info->store_evtchn) {
            known_domid[port] = status.u.interdomain.dom;
            known_remote[port] = status.u.interdomain.port;
        }
    }
}

evtchn_port_t known_port(domid_t domid, evtchn_port_t remote)
{
    for (evtchn_port_t port = 1; port < MAX_PORTS; port++)
        if (known_remote[port] == remote && known_domid[port] == domid && remote) {
            known_remote[port] = 0;
            return port;
        }
    return 0;
}

/* Those that no disk took over. */
static void close_known_ports(void)
{
    for (evtchn_port_t port = 1; port < MAX_PORTS; port++)
        if (known_remote[port]) {
            struct evtchn_close close = {.port = port};
            HYPERVISOR_event_channel_op(EVTCHNOP_close, &close);
            known_remote[port] = 0;
        }
}

/* Wait until no disk is on its way to be offered again: at most so long. */
#define TAKE_OVER (20 * NS_S)

void program(void)
{
    console_direct = true;
    const char *life = argument("life");
    uint64_t lives = 0;
    bool again = life && number(&life, 1u << 30, &lives) && lives;
    say("domio: life %lu of %lu pages", lives, start_info->nr_pages);
    HYPERVISOR_vcpu_op(VCPUOP_stop_periodic_timer, 0, NULL);
    if (again)
        find_ports();
    long timer = bind_virq(VIRQ_TIMER);
    if (timer < 0) {
        say("domio: no timer: %ld", timer);
        shutdown(SHUTDOWN_crash);
    }
    on_port(timer, wake);
    port_unmask(timer);
    pci_init();
    store_init(again);
    on_watch = disk_event;
    if (store_watch("backend/vbd", "scan")) {
        say("domio: xenstored refuses a watch");
        shutdown(SHUTDOWN_crash);
    }
    uint64_t ports_at = system_time() + TAKE_OVER;
    for (;;) {
        work = false;
        store_pump();
        if (scan_wanted) {
            scan_wanted = false;
            disks_scan();
        }
        uint64_t now = system_time(), until = now + NS_S;
        for (unsigned i = 0; i < MAX_DISKS; i++) {
            struct disk *disk = &disks[i];
            if (!disk->used)
                continue;
            disk_work(disk, now);
            if (!disk->used)
                continue;
            uint64_t next = now + (disk->nvme.state != NVME_READY && disk->nvme.state != NVME_OFF ? STARTING : TICK);
            until = next < until ? next : until;
            for (unsigned q = 0; disk->connected && q < disk->link.queues; q++)
                if (disk->queues[q].look_at && disk->queues[q].look_at < until)
                    until = disk->queues[q].look_at;
        }
        if (ports_at && now > ports_at) {
            ports_at = 0;
            close_known_ports();
        }
        idle(until);
    }
}
