/* Prints the time of day; with "watch" as its command line it waits, half a minute at most, for somebody to set it. */
#include <guest.h>

const char program_name[] = "wallclock";

/* In seconds since 1970, at system time 0. A version that is odd or has changed meanwhile: once more. */
static uint64_t at_start(uint32_t *version)
{
    volatile shared_info_t *shared = (volatile shared_info_t *)shared_info;
    for (;;) {
        uint32_t before = shared->wc_version;
        uint64_t seconds = shared->wc_sec | (uint64_t)shared->wc_sec_hi << 32;
        if (!(before & 1) && shared->wc_version == before) {
            *version = before;
            return seconds;
        }
    }
}

void program(void)
{
    uint32_t version, now;
    uint64_t start = at_start(&version);
    print("the time of day is %lu\n", start + system_time() / 1000000000);
    const char *line = (const char *)start_info->cmd_line;
    if (line[0] == 'w') {
        print("watching\n");
        for (unsigned i = 0; i < 3000; i++) {
            struct sched_poll p = {.nr_ports = 0, .timeout = system_time() + 10000000};
            HYPERVISOR_sched_op(SCHEDOP_poll, &p);
            uint64_t later = at_start(&now);
            if (now != version) {
                print("it moved by %ld seconds\n", (long)(later - start));
                break;
            }
        }
    }
    shutdown(SHUTDOWN_poweroff);
}
