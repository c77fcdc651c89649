/* Prints one line and powers off. */
#include <guest.h>

const char program_name[] = "hello";

void program(void)
{
    print("hello from a Xen guest\n");
    shutdown(SHUTDOWN_poweroff);
}
