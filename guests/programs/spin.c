/* Keeps its vCPU busy and says now and then how much it did: for tests of the scheduler. */
#include <guest.h>

const char program_name[] = "spin";

#define REPORT_NS 250000000ull

void program(void)
{
    volatile uint64_t work = 0;
    uint64_t next = system_time() + REPORT_NS;
    for (;;) {
        for (unsigned i = 0; i < 20000; i++)
            work++;
        if (system_time() >= next) {
            next = system_time() + REPORT_NS;
            print("spun %lu\n", (unsigned long)work);
        }
    }
}
