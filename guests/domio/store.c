/* xenstore over the shared ring (io/xs_wire.h): one request at a time, and the watch events that come between. */
#include "domio.h"

#define WAIT (10 * NS_S)

void (*on_watch)(const char *path, const char *token);
static uint32_t serial;
static volatile bool rung;

static struct xenstore_domain_interface *ring(void) { return mfn_to_virt(start_info->store_mfn); }

static void ring_rung(evtchn_port_t port)
{
    (void)port;
    rung = work = true;
}

static void wait_for_ring(uint64_t until)
{
    if (!rung) {
        bool before = work;
        work = false;
        idle(until);
        work = work || before;
    }
    rung = false;
}

/* xenstored that does not answer ends this program: it is built anew. */
static void must(bool in_time)
{
    if (in_time)
        return;
    say("domio: xenstored does not answer");
    shutdown(SHUTDOWN_crash);
}

static bool has_input(void)
{
    struct xenstore_domain_interface *intf = ring();
    return *(volatile XENSTORE_RING_IDX *)&intf->rsp_prod != intf->rsp_cons;
}

/* One message, closed with a zero. */
static uint32_t message(struct xsd_sockmsg *head, char *body, uint64_t deadline)
{
    must(xenstore_receive(head, sizeof(*head), deadline));
    if (head->len > XENSTORE_PAYLOAD_MAX) {
        say("domio: xenstored sent %u bytes", head->len);
        shutdown(SHUTDOWN_crash);
    }
    must(xenstore_receive(body, head->len, deadline));
    body[head->len] = 0;
    if (head->type == XS_WATCH_EVENT && on_watch) {
        const char *token = body + strlen(body) + 1;
        on_watch(body, token < body + head->len ? token : "");
    }
    return head->type;
}

void store_pump(void)
{
    static char body[XENSTORE_PAYLOAD_MAX + 1];
    struct xsd_sockmsg head;
    rung = false;
    while (has_input())
        message(&head, body, system_time() + WAIT); /* an answer that nobody waits for is of an earlier life */
}

static long request(unsigned type, const char *path, const char *second, bool closed, char *reply, size_t room)
{
    static char body[XENSTORE_PAYLOAD_MAX + 1];
    uint64_t deadline = system_time() + WAIT;
    size_t more = second ? strlen(second) + closed : 0;
    struct xsd_sockmsg head = {.type = type, .req_id = ++serial, .len = strlen(path) + 1 + more};
    if (head.len > XENSTORE_PAYLOAD_MAX)
        return -XEN_E2BIG;
    must(xenstore_send(&head, sizeof(head), deadline) && xenstore_send(path, strlen(path) + 1, deadline));
    must(xenstore_send(second, more, deadline));
    do
        message(&head, body, deadline);
    while (head.type == XS_WATCH_EVENT || head.req_id != serial);
    if (head.type == XS_ERROR)
        return -xenstore_error(body);
    if (head.type != type)
        return -XEN_EIO;
    if (reply) {
        if (head.len >= room)
            return -XEN_E2BIG;
        memcpy(reply, body, head.len + 1);
    }
    return head.len;
}

long store_read(const char *path, char *value, size_t room) { return request(XS_READ, path, NULL, false, value, room); }
long store_list(const char *path, char *names, size_t room) { return request(XS_DIRECTORY, path, NULL, false, names, room); }
long store_write(const char *path, const char *value) { return request(XS_WRITE, path, value, false, NULL, 0); }

static long watching(unsigned type, const char *path, const char *token)
{
    long rc = request(type, path, token, true, NULL, 0);
    return rc < 0 ? rc : 0;
}

long store_watch(const char *path, const char *token) { return watching(XS_WATCH, path, token); }
long store_unwatch(const char *path, const char *token) { return watching(XS_UNWATCH, path, token); }

bool text_to(char *out, size_t room, const char *text, ...)
{
    va_list args;
    va_start(args, text);
    size_t size = format(out, room, text, args);
    va_end(args);
    return size < room;
}

/* `again`: xenstored forgets an earlier life's watches and half a request (xenstore-ring.txt, reconnection). */
void store_init(bool again)
{
    struct xenstore_domain_interface *intf = ring();
    xenstore_wait = wait_for_ring;
    on_port(start_info->store_evtchn, ring_rung);
    port_unmask(start_info->store_evtchn);
    if (!again)
        return;
    if (!(intf->server_features & XENSTORE_SERVER_FEATURE_RECONNECTION)) {
        say("domio: xenstored cannot reconnect");
        shutdown(SHUTDOWN_crash);
    }
    volatile uint32_t *connection = &intf->connection;
    *connection = XENSTORE_RECONNECT;
    notify(start_info->store_evtchn);
    uint64_t deadline = system_time() + WAIT;
    while (*connection != XENSTORE_CONNECTED) {
        must(system_time() < deadline);
        wait_for_ring(system_time() + 10 * NS_MS);
    }
}
