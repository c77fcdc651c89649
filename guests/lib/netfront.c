/* A small network frontend (io/netif.h): one queue, one event channel, a page for each slot in use. No locks, no interrupts but a flag. */
#include <guest.h>
#include <netfront.h>

#define FIRST_REF 8u /* those before are reserved */

static char grant_page[PAGE_SIZE] PAGE_ALIGNED, tx_page[PAGE_SIZE] PAGE_ALIGNED, rx_page[PAGE_SIZE] PAGE_ALIGNED;
static char tx_buffers[NET_BUFFERS][PAGE_SIZE] PAGE_ALIGNED, rx_buffers[NET_BUFFERS][PAGE_SIZE] PAGE_ALIGNED;
static volatile grant_entry_v1_t *grants;
static netif_tx_front_ring_t tx;
static netif_rx_front_ring_t rx;
static evtchn_port_t channel;
static domid_t backend_id;
static char backend[128];
static unsigned tx_free[NET_BUFFERS], tx_frees;

volatile bool net_event;
int net_status;

static void raised(evtchn_port_t port)
{
    (void)port;
    net_event = true;
}

static void grant(grant_ref_t ref, const void *page, uint16_t flags)
{
    grants[ref].domid = backend_id;
    grants[ref].frame = (uint32_t)virt_to_mfn(page);
    barrier();
    grants[ref].flags = GTF_permit_access | flags;
}

static long number(const char *path)
{
    char text[32];
    long size = xenstore_read(path, text, sizeof(text)), value = 0;
    if (size < 1)
        return size < 0 ? size : -XEN_EINVAL;
    for (long i = 0; i < size && i < 20; i++) {
        if (text[i] < '0' || text[i] > '9')
            return -XEN_EINVAL;
        value = value * 10 + text[i] - '0';
    }
    return value;
}

static void text_of(char *out, size_t room, const char *what, ...)
{
    va_list args;
    va_start(args, what);
    format(out, room, what, args);
    va_end(args);
}

long net_node(const char *name, char *value, size_t room)
{
    char path[128];
    text_of(path, sizeof(path), "device/vif/0/%s", name);
    return xenstore_read(path, value, room);
}

long net_backend_number(const char *name)
{
    char path[192];
    text_of(path, sizeof(path), "%s/%s", backend, name);
    return number(path);
}

static bool write_number(const char *name, unsigned value)
{
    char path[128], text[16];
    text_of(path, sizeof(path), "device/vif/0/%s", name);
    text_of(text, sizeof(text), "%u", value);
    return xenstore_write(path, text) >= 0;
}

bool net_set_state(unsigned state) { return write_number("state", state); }

bool net_wait_backend(unsigned state, uint64_t ns)
{
    uint64_t until = system_time() + ns;
    while (net_backend_number("state") != (long)state) {
        if (system_time() > until)
            return false;
        struct sched_poll poll = {.nr_ports = 0, .timeout = system_time() + 5000000};
        HYPERVISOR_sched_op(SCHEDOP_poll, &poll);
    }
    return true;
}

bool net_find(void)
{
    long id = number("device/vif/0/backend-id");
    if (is_initial_domain() || id < 0 || net_node("backend", backend, sizeof(backend)) < 1)
        return false;
    backend_id = (domid_t)id;
    return true;
}

static bool set_up_grants(void)
{
    if (grants)
        return true;
    xen_pfn_t frames[1];
    struct gnttab_setup_table setup = {.dom = DOMID_SELF, .nr_frames = 1};
    set_xen_guest_handle(setup.frame_list, frames);
    if (HYPERVISOR_grant_table_op(GNTTABOP_setup_table, &setup, 1) || setup.status != GNTST_okay)
        return false;
    if (set_pte(grant_page, (uint64_t)frames[0] << PAGE_SHIFT | PTE_RW))
        return false;
    grants = (volatile grant_entry_v1_t *)grant_page;
    return true;
}

static void give(unsigned buffer)
{
    netif_rx_request_t *request = RING_GET_REQUEST(&rx, rx.req_prod_pvt++);
    request->id = (uint16_t)buffer;
    request->gref = FIRST_REF + 2 + NET_BUFFERS + buffer;
}

bool net_publish(unsigned features)
{
    if (!set_up_grants())
        return false;
    SHARED_RING_INIT((netif_tx_sring_t *)tx_page);
    FRONT_RING_INIT(&tx, (netif_tx_sring_t *)tx_page, PAGE_SIZE);
    SHARED_RING_INIT((netif_rx_sring_t *)rx_page);
    FRONT_RING_INIT(&rx, (netif_rx_sring_t *)rx_page, PAGE_SIZE);
    grant(FIRST_REF, tx_page, 0);
    grant(FIRST_REF + 1, rx_page, 0);
    for (unsigned i = 0; i < NET_BUFFERS; i++) {
        grant(FIRST_REF + 2 + i, tx_buffers[i], GTF_readonly);
        grant(FIRST_REF + 2 + NET_BUFFERS + i, rx_buffers[i], 0);
        tx_free[i] = i;
        give(i);
    }
    tx_frees = NET_BUFFERS;
    int ready;
    RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&rx, ready);
    (void)ready;
    struct evtchn_alloc_unbound op = {.dom = DOMID_SELF, .remote_dom = backend_id};
    if (HYPERVISOR_event_channel_op(EVTCHNOP_alloc_unbound, &op))
        return false;
    channel = op.port;
    on_port(channel, raised);
    port_unmask(channel);
    return write_number("tx-ring-ref", FIRST_REF) && write_number("rx-ring-ref", FIRST_REF + 1) &&
           write_number("event-channel", channel) && write_number("request-rx-copy", 1) &&
           write_number("feature-rx-notify", 1) && write_number("feature-sg", !!(features & NET_SCATTER)) &&
           write_number("feature-no-csum-offload", 1) &&
           write_number("request-multicast-control", !!(features & NET_MULTICAST_CONTROL));
}

void net_unpublish(void)
{
    struct evtchn_close close = {.port = channel};
    HYPERVISOR_event_channel_op(EVTCHNOP_close, &close);
    for (unsigned i = 0; i < 2 + 2 * NET_BUFFERS; i++)
        grants[FIRST_REF + i].flags = 0;
}

static void reap(void)
{
    int more;
    do {
        RING_IDX until = tx.sring->rsp_prod;
        xen_rmb();
        for (; tx.rsp_cons != until; tx.rsp_cons++) {
            netif_tx_response_t *response = RING_GET_RESPONSE(&tx, tx.rsp_cons);
            if (response->status == NETIF_RSP_NULL)
                continue;
            net_status = response->status;
            if (response->id < NET_BUFFERS)
                tx_free[tx_frees++] = response->id;
        }
        RING_FINAL_CHECK_FOR_RESPONSES(&tx, more);
    } while (more);
}

void net_flush(void)
{
    int notify_it;
    RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&tx, notify_it);
    if (notify_it)
        notify(channel);
}

static netif_tx_request_t *put(const void *data, size_t size, unsigned flags)
{
    unsigned buffer = tx_free[--tx_frees];
    memcpy(tx_buffers[buffer], data, size);
    netif_tx_request_t *request = RING_GET_REQUEST(&tx, tx.req_prod_pvt++);
    request->gref = FIRST_REF + 2 + buffer;
    request->offset = 0;
    request->flags = (uint16_t)flags;
    request->id = (uint16_t)buffer;
    request->size = (uint16_t)size;
    return request;
}

bool net_queue(const void *data, size_t size, unsigned flags, size_t first)
{
    size_t slots = first && first < size ? 1 + (size - first + PAGE_SIZE - 1) / PAGE_SIZE : (size + PAGE_SIZE - 1) / PAGE_SIZE;
    reap();
    if (tx_frees < slots || RING_FREE_REQUESTS(&tx) < slots)
        return false;
    const char *from = data;
    for (size_t slot = 0, at = 0; slot < slots; slot++) {
        size_t part = slot == 0 && first && first < size ? first : PAGE_SIZE;
        if (part > size - at)
            part = size - at;
        netif_tx_request_t *request =
            put(from + at, part, (slot ? 0 : flags) | (slot + 1 < slots ? NETTXF_more_data : 0));
        if (!slot)
            request->size = (uint16_t)size;
        at += part;
    }
    return true;
}

bool net_group(bool add, const uint8_t *group)
{
    reap();
    if (!tx_frees || RING_FREE_REQUESTS(&tx) < 2)
        return false;
    put(group, 6, NETTXF_extra_info);
    netif_extra_info_t *extra = (netif_extra_info_t *)RING_GET_REQUEST(&tx, tx.req_prod_pvt++);
    memset(extra, 0, sizeof(*extra));
    extra->type = add ? XEN_NETIF_EXTRA_TYPE_MCAST_ADD : XEN_NETIF_EXTRA_TYPE_MCAST_DEL;
    memcpy(extra->u.mcast.addr, group, 6);
    net_flush();
    return true;
}

bool net_sent(uint64_t ns)
{
    uint64_t until = system_time() + ns;
    while (reap(), tx_frees < NET_BUFFERS) {
        if (system_time() > until)
            return false;
        struct sched_poll poll = {.nr_ports = 0, .timeout = system_time() + 1000000};
        HYPERVISOR_sched_op(SCHEDOP_poll, &poll);
    }
    return true;
}

long net_receive(void *data, size_t room)
{
    char *to = data;
    long size = 0;
    for (bool more = true; more;) {
        if (rx.rsp_cons == *(volatile RING_IDX *)&rx.sring->rsp_prod) {
            int arrived;
            RING_FINAL_CHECK_FOR_RESPONSES(&rx, arrived);
            if (!arrived)
                return size ? -XEN_EIO : 0;
        }
        xen_rmb();
        netif_rx_response_t response = *RING_GET_RESPONSE(&rx, rx.rsp_cons);
        unsigned buffer = response.id;
        rx.rsp_cons++;
        if (buffer >= NET_BUFFERS)
            return -XEN_EIO;
        if (response.status < 0)
            size = -XEN_EIO;
        else if (size >= 0 && (size_t)size + (size_t)response.status <= room) {
            memcpy(to + size, rx_buffers[buffer] + response.offset, (size_t)response.status);
            size += response.status;
        } else
            size = -XEN_E2BIG;
        more = response.flags & NETRXF_more_data;
        give(buffer);
    }
    int notify_it;
    RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&rx, notify_it);
    if (notify_it)
        notify(channel);
    return size;
}

void net_break(void)
{
    tx.req_prod_pvt += 5000;
    net_flush();
    notify(channel);
}
