/* A minimal xenstore client over the shared ring (io/xs_wire.h): one request at a time, no watches. */
#include <guest.h>

#define WAIT_NS 1000000000ul

static const struct {
    const char *name;
    int value;
} errors[] = {
#define XEN_ERRNO(name, value) {#name, value},
#include <xen/errno.h>
};

static struct xenstore_domain_interface *ring(void) { return mfn_to_virt(start_info->store_mfn); }

static void pause_for(uint64_t until)
{
    evtchn_port_t port = start_info->store_evtchn;
    struct sched_poll poll = {.nr_ports = 1, .timeout = until};
    set_xen_guest_handle(poll.ports, &port);
    port_clear(port);
    HYPERVISOR_sched_op(SCHEDOP_poll, &poll);
}

void (*xenstore_wait)(uint64_t until) = pause_for;

int xenstore_error(const char *name)
{
    for (size_t i = 0; i < ARRAY_SIZE(errors); i++)
        if (!strcmp(name, errors[i].name))
            return errors[i].value;
    return XEN_EINVAL;
}

bool xenstore_send(const void *data, size_t size, uint64_t deadline)
{
    struct xenstore_domain_interface *intf = ring();
    const char *from = data;
    while (size) {
        XENSTORE_RING_IDX cons = *(volatile XENSTORE_RING_IDX *)&intf->req_cons, prod = intf->req_prod;
        if (prod - cons >= XENSTORE_RING_SIZE) {
            if (system_time() > deadline)
                return false;
            xenstore_wait(system_time() + 10000000);
            continue;
        }
        for (; size && prod - cons < XENSTORE_RING_SIZE; size--)
            intf->req[MASK_XENSTORE_IDX(prod++)] = *from++;
        barrier();
        *(volatile XENSTORE_RING_IDX *)&intf->req_prod = prod;
        notify(start_info->store_evtchn);
    }
    return true;
}

bool xenstore_receive(void *data, size_t size, uint64_t deadline)
{
    struct xenstore_domain_interface *intf = ring();
    char *to = data;
    while (size) {
        XENSTORE_RING_IDX cons = intf->rsp_cons, prod = *(volatile XENSTORE_RING_IDX *)&intf->rsp_prod;
        if (prod == cons) {
            if (system_time() > deadline)
                return false;
            xenstore_wait(system_time() + 10000000);
            continue;
        }
        for (; size && cons != prod; size--)
            *to++ = intf->rsp[MASK_XENSTORE_IDX(cons++)];
        barrier();
        *(volatile XENSTORE_RING_IDX *)&intf->rsp_cons = cons;
        notify(start_info->store_evtchn);
    }
    return true;
}

static long request(unsigned type, const char *path, const char *value, char *reply, size_t room)
{
    if (is_initial_domain())
        return -XEN_ENXIO;
    uint64_t deadline = system_time() + WAIT_NS;
    static uint32_t number;
    struct xsd_sockmsg head = {.type = type, .req_id = ++number, .len = strlen(path) + 1 + (value ? strlen(value) : 0)};
    char body[XENSTORE_PAYLOAD_MAX];
    if (head.len > sizeof(body))
        return -XEN_E2BIG;
    if (!xenstore_send(&head, sizeof(head), deadline) || !xenstore_send(path, strlen(path) + 1, deadline))
        return -XEN_ETIMEDOUT;
    if (value && !xenstore_send(value, strlen(value), deadline))
        return -XEN_ETIMEDOUT;
    if (!xenstore_receive(&head, sizeof(head), deadline))
        return -XEN_ETIMEDOUT;
    if (head.len > sizeof(body) || head.req_id != number)
        return -XEN_EIO;
    if (!xenstore_receive(body, head.len, deadline))
        return -XEN_ETIMEDOUT;
    if (head.type == XS_ERROR)
        return -(head.len && !body[head.len - 1] ? xenstore_error(body) : XEN_EINVAL);
    if (head.type != type)
        return -XEN_EIO;
    if (reply && room) {
        size_t size = head.len < room - 1 ? head.len : room - 1;
        memcpy(reply, body, size);
        reply[size] = 0;
    }
    return head.len;
}

long xenstore_read(const char *path, char *value, size_t room) { return request(XS_READ, path, NULL, value, room); }

long xenstore_write(const char *path, const char *value) { return request(XS_WRITE, path, value, NULL, 0); }
