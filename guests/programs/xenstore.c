/* The xenstore ring as a guest sees it: its own directory, what it may write, and the errors by name. */
#include <guest.h>

const char program_name[] = "xenstore";

void program(void)
{
    if (is_initial_domain()) {
        skip("xenstore", "the initial domain has no ring at its start");
        return;
    }
    char value[256];
    long size = xenstore_read("domid", value, sizeof(value));
    ok(size >= 1, "read domid, relative to the guest's own directory (%ld)", size);
    bool digits = size >= 1;
    for (long i = 0; i < size && i < (long)sizeof(value); i++)
        digits &= value[i] >= '0' && value[i] <= '9';
    ok(digits, "it is a number, without a closing zero");
    ok(xenstore_read("name", value, sizeof(value)) >= 1, "read name");
    same(xenstore_read("no/such/node", value, sizeof(value)), -XEN_ENOENT, "read of a node that is not there: ENOENT");
    same(xenstore_read("bad//path", value, sizeof(value)), -XEN_EINVAL, "read of what is no path: EINVAL");
    ok(xenstore_write("data/conformance", "first") > 0, "write in the data directory");
    same(xenstore_read("data/conformance", value, sizeof(value)), 5, "read it back: its length");
    ok(!strcmp(value, "first"), "and its value");
    ok(xenstore_write("data/conformance", "") > 0, "write an empty value");
    same(xenstore_read("data/conformance", value, sizeof(value)), 0, "read it back: nothing");
    same(xenstore_write("/local/domain/0/conformance", "x"), -XEN_EACCES, "write in another domain's directory: EACCES");
    bool fine = true;
    for (unsigned i = 0; i < 200; i++)
        fine &= xenstore_read("domid", value, sizeof(value)) == size;
    ok(fine, "two hundred requests, round the ring more than once");
}
