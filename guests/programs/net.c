/* A network frontend against the machine's back end: up, answer what comes, down, up again, and a ring broken on purpose.

Once it is up it prints "net: up" and answers ARP for 10.0.0.2, ICMP echo, and UDP: port 7 (sent back with a checksum that is left to the back
end), 8 (without a checksum), 10 (in two slots); 9 goes on to the next step.
Without an interface it checks nothing. */
#include <netfront.h>

const char program_name[] = "net";

#define SECOND 1000000000ul
#define PATIENCE (60 * SECOND)
#define TURN (30 * SECOND) /* a back end whose process died comes back meanwhile */

static uint8_t frame[70000], mac[6];
static const uint8_t address[4] = {10, 0, 0, 2};
static const uint8_t group[6] = {0x01, 0x00, 0x5e, 0x01, 0x02, 0x03};
static unsigned answered;

static uint32_t sum(const uint8_t *data, size_t size, uint32_t start)
{
    for (size_t i = 0; i < size; i++)
        start += (uint32_t)data[i] << (i & 1 ? 0 : 8);
    while (start >> 16)
        start = (start & 0xffff) + (start >> 16);
    return start;
}

static void put16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static void turn_round(void)
{
    memcpy(frame, frame + 6, 6);
    memcpy(frame + 6, mac, 6);
}

static void send(size_t size, unsigned flags, size_t first)
{
    if (net_queue(frame, size, flags, first)) {
        net_flush();
        answered++;
    }
}

static void arp(size_t size)
{
    if (size < 42 || frame[21] != 1 || memcmp(frame + 38, address, 4))
        return;
    turn_round();
    frame[21] = 2;
    memcpy(frame + 32, frame + 22, 10);
    memcpy(frame + 22, mac, 6);
    memcpy(frame + 28, address, 4);
    send(42, 0, 0);
}

/* True: go on to the next step. */
static bool ip(size_t size)
{
    uint8_t *head = frame + 14, *body = head + (head[0] & 15) * 4;
    size_t length = (size_t)head[2] << 8 | head[3];
    if (size < 34 || length + 14 > size || memcmp(head + 16, address, 4))
        return false;
    uint8_t peer[4];
    memcpy(peer, head + 12, 4);
    unsigned port = body[2] << 8 | body[3];
    if (head[9] == 17 && port == 9)
        return true;
    turn_round();
    memcpy(head + 12, address, 4);
    memcpy(head + 16, peer, 4);
    if (head[9] == 1 && body[0] == 8) {
        body[0] = 0;
        put16(body + 2, 0);
        put16(body + 2, ~sum(body, (size_t)(frame + 14 + length - body), 0));
        send(14 + length, 0, 0);
    } else if (head[9] == 17 && (port == 7 || port == 8 || port == 10)) {
        uint8_t from[2] = {body[0], body[1]};
        memcpy(body, body + 2, 2);
        memcpy(body + 2, from, 2);
        put16(body + 6, port == 7 ? 0xdead : 0);
        send(14 + length, port == 7 ? NETTXF_csum_blank | NETTXF_data_validated : 0, port == 10 ? 42 : 0);
    }
    return false;
}

static bool serve(void)
{
    uint64_t until = system_time() + PATIENCE;
    while (system_time() < until) {
        long size = net_receive(frame, sizeof(frame));
        if (size < 0) {
            ok(false, "a frame that can be received (%ld)", size);
            return false;
        }
        if (!size) {
            wait_for(&net_event, SECOND / 10);
            net_event = false;
            continue;
        }
        if (size >= 14 && frame[12] == 8 && frame[13] == 6)
            arp((size_t)size);
        else if (size >= 14 && frame[12] == 8 && frame[13] == 0 && ip((size_t)size))
            return true;
        else if (!memcmp(frame, group, 6))
            print("net: group %u bytes\n", (unsigned)size);
    }
    return false;
}

static bool read_mac(void)
{
    char text[32];
    if (net_node("mac", text, sizeof(text)) != 17)
        return false;
    for (unsigned i = 0; i < 17; i++) {
        char c = text[i];
        unsigned digit = c >= 'a' ? (unsigned)(c - 'a' + 10) : (unsigned)(c - '0');
        if (i % 3 == 2)
            continue;
        if (digit > 15)
            return false;
        mac[i / 3] = (uint8_t)(i % 3 ? mac[i / 3] << 4 | digit : digit);
    }
    return !(mac[0] & 1);
}

static bool up(const char *what)
{
    ok(net_wait_backend(XenbusStateInitWait, TURN), "%s: the back end is in InitWait", what);
    ok(net_publish(NET_SCATTER | NET_MULTICAST_CONTROL), "%s: rings, grants, channel and nodes", what);
    ok(net_set_state(XenbusStateConnected), "%s: Connected", what);
    bool there = net_wait_backend(XenbusStateConnected, TURN);
    ok(there, "%s: the back end follows", what);
    return there;
}

static void announce(void)
{
    /* A gratuitous ARP request, which also tells the bridge where this guest is. */
    static const uint8_t head[] = {8, 6, 0, 1, 8, 0, 6, 4, 0, 1};
    memset(frame, 0xff, 6);
    memcpy(frame + 6, mac, 6);
    memcpy(frame + 12, head, sizeof(head));
    memcpy(frame + 22, mac, 6);
    memcpy(frame + 28, address, 4);
    memset(frame + 32, 0, 6);
    memcpy(frame + 38, address, 4);
    net_status = 1;
    ok(net_queue(frame, 42, 0, 0), "a frame fits the ring");
    net_flush();
    ok(net_sent(TURN), "it is answered");
    same(net_status, NETIF_RSP_OKAY, "with NETIF_RSP_OKAY");
}

static void refused(void)
{
    net_status = 1;
    ok(net_queue(frame, 10, 0, 0), "a frame of 10 bytes");
    net_flush();
    ok(net_sent(TURN), "is answered");
    same(net_status, NETIF_RSP_ERROR, "with NETIF_RSP_ERROR: shorter than an Ethernet header");
}

void program(void)
{
    if (!net_find()) {
        skip("network", "there is no interface");
        return;
    }
    ok(read_mac(), "the node mac is an address of one station");
    ok(net_wait_backend(XenbusStateInitWait, TURN), "the back end comes to InitWait");
    same(net_backend_number("feature-rx-copy"), 1, "feature-rx-copy");
    same(net_backend_number("feature-sg"), 1, "feature-sg");
    ok(net_backend_number("multi-queue-max-queues") >= 1, "multi-queue-max-queues");
    if (!up("first"))
        return;
    announce();
    refused();
    ok(net_group(true, group), "ask for a multicast group");
    ok(net_sent(TURN), "it is answered");
    same(net_status, NETIF_RSP_OKAY, "with NETIF_RSP_OKAY");
    print("net: up\n");
    ok(serve(), "told to go on, after %u answers", answered);

    ok(net_set_state(XenbusStateClosing), "Closing");
    ok(net_wait_backend(XenbusStateClosing, TURN), "the back end follows");
    ok(net_set_state(XenbusStateClosed), "Closed");
    ok(net_wait_backend(XenbusStateClosed, TURN), "the back end follows");
    net_unpublish();
    ok(net_set_state(XenbusStateInitialising), "Initialising again");
    if (!up("again"))
        return;
    announce();
    print("net: up again\n");
    ok(serve(), "told to go on, after %u answers", answered);

    net_break();
    ok(net_wait_backend(XenbusStateClosing, TURN), "a ring with impossible indexes: the back end goes to Closing");
    ok(net_set_state(XenbusStateClosed), "Closed");
    ok(net_wait_backend(XenbusStateClosed, TURN), "the back end follows");
    net_unpublish();
    ok(net_set_state(XenbusStateInitialising), "Initialising once more");
    if (up("third"))
        announce();
}
