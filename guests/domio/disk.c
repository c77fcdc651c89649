/* A virtual disk's way up and down: its directory and its frontend's (XenbusState, nodes as in io/blkif.h). */
#include "domio.h"

#define TRIES 4

struct disk disks[MAX_DISKS];
struct disk_pages pages_of[MAX_DISKS];
volatile bool scan_wanted = true;
static char names[STORE_ROOM], more_names[STORE_ROOM];

void disk_interrupt(evtchn_port_t port)
{
    (void)port;
    work = true;
}

/* --- nodes --- */

/* A node's value: its length, or -1 if there is none, or it is longer than `room` allows. */
static long node(const char *base, const char *name, char *value, size_t room)
{
    char path[2 * PATH];
    if (!text_to(path, sizeof(path), "%s/%s", base, name))
        return -1;
    long size = store_read(path, value, room);
    return size < 0 ? -1 : size;
}

/* A decimal number of a node that somebody else wrote. 1: there is none; -1: it is none, or out of bounds. */
static int node_number(const char *base, const char *name, uint64_t low, uint64_t high, uint64_t *value)
{
    char text[32];
    const char *at = text;
    long size = node(base, name, text, sizeof(text));
    if (size < 0)
        return 1;
    if (!number(&at, high, value) || *value < low || (*at && *at != '\n'))
        return -1;
    return 0;
}

static bool put(struct disk *disk, const char *name, const char *format_text, ...) __attribute__((format(printf, 3, 4)));
static bool put(struct disk *disk, const char *name, const char *format_text, ...)
{
    char path[2 * PATH], value[256];
    va_list args;
    va_start(args, format_text);
    format(value, sizeof(value), format_text, args);
    va_end(args);
    return text_to(path, sizeof(path), "%s/%s", disk->path, name) && store_write(path, value) >= 0;
}

static void enter(struct disk *disk, int state)
{
    if (state == XenbusStateInitWait) {
        bool discard = disk->discard && disk->nvme.can_discard;
        put(disk, "feature-flush-cache", "1");
        put(disk, "feature-barrier", "1");
        put(disk, "feature-persistent", "1");
        put(disk, "max-ring-page-order", "%d", MAX_RING_ORDER);
        put(disk, "max-ring-pages", "%d", MAX_RING_PAGES);
        put(disk, "multi-queue-max-queues", "%d", MAX_QUEUES);
        put(disk, "feature-max-indirect-segments", "%d", MAX_SEGMENTS);
        put(disk, "feature-discard", "%d", discard);
        if (discard) {
            put(disk, "discard-granularity", "%d", SECTOR);
            put(disk, "discard-alignment", "0");
            put(disk, "discard-secure", "0");
        }
    }
    if (put(disk, "state", "%d", state))
        disk->state = state;
}

static int state_in(const char *base)
{
    uint64_t value;
    return node_number(base, "state", 0, XenbusStateReconfigured, &value) ? XenbusStateUnknown : (int)value;
}

/* --- the frontend's side --- */

static const char *read_link(struct disk *disk, struct link *link)
{
    char text[32], name[32], place[2 * PATH];
    const char *base = disk->frontend;
    uint64_t value;
    int rc;
    memset(link, 0, sizeof(*link));
    link->frontend = disk->frontend_id;
    if (node(base, "protocol", text, sizeof(text)) > 0) {
        if (strcmp(text, "x86_64-abi") && strcmp(text, "x86_32-abi"))
            return "its protocol is unknown";
        link->abi = !strcmp(text, "x86_32-abi");
    }
    rc = node_number(base, "ring-page-order", 0, MAX_RING_ORDER, &value);
    if (rc < 0)
        return "ring-page-order makes no sense";
    link->pages = 1u << (rc ? 0 : value);
    if (rc) {
        rc = node_number(base, "num-ring-pages", 1, MAX_RING_PAGES, &value);
        if (rc < 0 || (!rc && value & (value - 1)))
            return "num-ring-pages makes no sense";
        link->pages = rc ? 1 : value;
    }
    rc = node_number(base, "multi-queue-num-queues", 1, MAX_QUEUES, &value);
    if (rc < 0)
        return "multi-queue-num-queues makes no sense";
    link->queues = rc ? 1 : value;
    rc = node_number(base, "feature-persistent", 0, 1, &value);
    if (rc < 0)
        return "feature-persistent makes no sense";
    link->persistent = rc ? 0 : value;
    for (unsigned q = 0; q < link->queues; q++) {
        if (!(link->queues == 1 ? text_to(place, sizeof(place), "%s", base) : text_to(place, sizeof(place), "%s/queue-%u", base, q)))
            return "its path is too long";
        if (node_number(place, "event-channel", 1, 0xFFFFFFFF, &value))
            return "event-channel is missing, or makes no sense";
        link->ports[q] = value;
        for (unsigned page = 0; page < link->pages; page++) {
            text_to(name, sizeof(name), "ring-ref%u", page);
            rc = link->pages == 1 ? node_number(place, "ring-ref", 0, 0xFFFFFFFF, &value) : 1;
            if (rc > 0)
                rc = node_number(place, name, 0, 0xFFFFFFFF, &value);
            if (rc)
                return "ring-ref is missing, or makes no sense";
            link->refs[q][page] = value;
        }
    }
    for (unsigned i = 0; i < link->queues * link->pages; i++)
        for (unsigned j = 0; j < i; j++)
            if (link->refs[i / link->pages][i % link->pages] == link->refs[j / link->pages][j % link->pages])
                return "two ring pages have the same grant";
    return NULL;
}

static const char *connect(struct disk *disk)
{
    struct link link;
    const char *wrong = read_link(disk, &link);
    if (wrong)
        return wrong;
    put(disk, "sectors", "%lu", disk->nvme.sectors);
    put(disk, "info", "%d", VDISK_CDROM * disk->cdrom | VDISK_REMOVABLE * disk->removable | VDISK_READONLY * disk->read_only);
    put(disk, "sector-size", "%d", SECTOR);
    put(disk, "physical-sector-size", "%d", SECTOR);
    return rings_attach(disk, &link, false);
}

/* True if nothing of the frontend is under way or mapped any more. */
static bool disconnect(struct disk *disk)
{
    if (!disk->connected)
        return true;
    disk->draining = true;
    if (disk->in_use)
        return false;
    disk->draining = false;
    rings_detach(disk);
    return true;
}

/* This frontend cannot be served (any longer). */
static void refuse(struct disk *disk, const char *why)
{
    char path[2 * PATH], text[192];
    say("domio: %s: %s", disk->path, why);
    disconnect(disk);
    if (text_to(path, sizeof(path), "error/%s/error", disk->path) && text_to(text, sizeof(text), "22 %s", why))
        store_write(path, text); /* its place may be taken, or full: the log has it */
    if (disk->state != XenbusStateClosing && disk->state != XenbusStateClosed)
        enter(disk, XenbusStateClosing);
}

static void close_disk(struct disk *disk)
{
    char token[16];
    if (disk->connected) {
        rings_detach(disk);
        disk->nvme.state = NVME_OFF; /* commands may be under way: they are forgotten with its queues */
    }
    text_to(token, sizeof(token), "%u", disk->place);
    store_unwatch(disk->frontend, token);
    if (disk->nvme.port) {
        struct evtchn_close close = {.port = disk->nvme.port};
        port_mask(disk->nvme.port);
        HYPERVISOR_event_channel_op(EVTCHNOP_close, &close);
    }
    say("domio: %s is gone", disk->path);
    disk->used = false;
}

/* What a back end does when it sees its frontend in a state (io/xenbus.h). True if something changed that may lead to more. */
static bool react(struct disk *disk)
{
    uint64_t online = 0;
    int peer = state_in(disk->frontend), own = disk->state;
    bool stays = !node_number(disk->path, "online", 0, 1, &online) && online;
    bool down = own == XenbusStateClosing || own == XenbusStateClosed;
    if (disk->draining && !disconnect(disk))
        return false;
    switch (peer) {
    case XenbusStateInitialising:
        if (own == XenbusStateInitWait)
            return false;
        if (own == XenbusStateInitialising || down) {
            if (own == XenbusStateClosing && !disconnect(disk))
                return false;
        } else if (!disconnect(disk))
            return false;
        enter(disk, XenbusStateInitWait);
        return true;
    case XenbusStateInitialised:
    case XenbusStateConnected:
        if (own == XenbusStateInitialising)
            enter(disk, XenbusStateInitWait);
        if (disk->state == XenbusStateInitWait || disk->state == XenbusStateInitialised) {
            const char *wrong = disconnect(disk) ? connect(disk) : "the last connection is not over";
            if (wrong)
                refuse(disk, wrong);
            else
                enter(disk, XenbusStateConnected);
            return true;
        }
        if (own == XenbusStateReconfigured)
            enter(disk, XenbusStateConnected);
        return false;
    case XenbusStateReconfiguring:
        if (own == XenbusStateConnected)
            enter(disk, XenbusStateReconfigured);
        return false;
    case XenbusStateClosing:
        if (down)
            return false;
        if (!disconnect(disk))
            return false;
        enter(disk, XenbusStateClosing);
        return true;
    case XenbusStateClosed:
    case XenbusStateUnknown:
        if (own != XenbusStateClosed) {
            if (!disconnect(disk)) {
                if (!down)
                    enter(disk, XenbusStateClosing);
                return false;
            }
            enter(disk, XenbusStateClosed);
        }
        if (peer == XenbusStateUnknown || !stays)
            disk->gone = true;
        return false;
    default:
        return false;
    }
}

/* --- the life of a disk --- */

static void offer(struct disk *disk)
{
    char token[16];
    disk->offered = true;
    say("domio: %s: %lu sectors of controller %02x", disk->path, disk->nvme.sectors, disk->nvme.bdf >> 3);
    disk->state = state_in(disk->path);
    if (disk->state == XenbusStateConnected) { /* an earlier life served this frontend: go on, without its knowing */
        const char *wrong = "there is no ledger of the connection";
        if (ledger_valid(disk->ledger) && disk->ledger->link.frontend == disk->frontend_id && disk->ledger->link.queues <= MAX_QUEUES &&
            disk->ledger->link.pages <= MAX_RING_PAGES && disk->ledger->link.abi < 2) {
            struct link link = disk->ledger->link;
            wrong = rings_attach(disk, &link, true);
        }
        if (wrong)
            refuse(disk, wrong);
    } else
        ledger_end(disk->ledger);
    text_to(token, sizeof(token), "%u", disk->place);
    char path[2 * PATH];
    if (text_to(path, sizeof(path), "%s/state", disk->frontend))
        store_watch(path, token);
    disk->changed = true;
}

void disk_work(struct disk *disk, uint64_t now)
{
    if (nvme_step(disk, now)) {
        if (!disk->offered)
            offer(disk);
        else if (disk->connected) {
            ledger_power(disk->ledger, disk->nvme.power_losses);
            rings_reissue(disk);
        }
    }
    if (!disk->offered)
        return;
    if (disk->connected) {
        rings_work(disk, now);
        if (disk->error && !disk->draining)
            refuse(disk, disk->error);
        if (disk->draining && !disk->in_use)
            disk->changed = true;
    }
    for (int i = 0; disk->changed && i < TRIES; i++) {
        disk->changed = false;
        if (react(disk))
            disk->changed = true;
    }
    if (disk->changed)
        work = true;
    if (disk->gone)
        close_disk(disk);
}

static void found(const char *domid, const char *name)
{
    char path[PATH], text[PATH];
    const char *at;
    uint64_t bdf = 0, frontend = 0;
    if (!text_to(path, sizeof(path), "backend/vbd/%s/%s", domid, name) || node(path, "discard-enable", text, sizeof(text)) < 0)
        return; /* not complete yet: this is the last node that the toolstack writes */
    bool discards = !strcmp(text, "1");
    for (unsigned i = 0; i < MAX_DISKS; i++)
        if (disks[i].used && !strcmp(disks[i].path, path)) {
            disks[i].present = true;
            return;
        }
    at = text;
    if (node(path, "params", text, sizeof(text)) < 6 || memcmp(text, "nvme:", 5))
        return;
    for (at = text + 5; *at; at++) {
        unsigned digit = *at >= '0' && *at <= '9' ? *at - '0' : *at >= 'a' && *at <= 'f' ? *at - 'a' + 10 : 16;
        if (digit > 15 || bdf > 0xFFF)
            return;
        bdf = bdf << 4 | digit;
    }
    unsigned place = (bdf >> 3) - 1;
    if (bdf & 7 || place >= MAX_DISKS || node_number(path, "frontend-id", 0, 0x7FEF, &frontend)) {
        say("domio: %s: is on no controller that there can be", path);
        return;
    }
    struct disk *disk = &disks[place];
    if (disk->used)
        return; /* its controller serves another one, which is on its way out */
    memset(disk, 0, sizeof(*disk));
    memcpy(disk->path, path, sizeof(path));
    disk->frontend_id = frontend;
    disk->place = place;
    disk->nvme.bdf = bdf;
    disk->discard = discards;
    fifo_init(&disk->issue);
    fifo_init(&disk->done);
    if (node(path, "frontend", disk->frontend, sizeof(disk->frontend)) < 0)
        return;
    disk->read_only = node(path, "mode", text, sizeof(text)) < 0 || strcmp(text, "w");
    disk->removable = node(path, "removable", text, sizeof(text)) > 0 && !strcmp(text, "1");
    disk->cdrom = node(path, "device-type", text, sizeof(text)) > 0 && !strcmp(text, "cdrom");
    disk->ledger = ledger_of(place);
    if (!disk->ledger) {
        say("domio: %s: there is no room for its ledger", path);
        return;
    }
    disk->used = disk->present = true;
    work = true;
}

void disks_scan(void)
{
    for (unsigned i = 0; i < MAX_DISKS; i++)
        disks[i].present = false;
    long size = store_list("backend/vbd", names, sizeof(names));
    for (long at = 0; at < size; at += strlen(names + at) + 1) {
        char path[PATH];
        if (!text_to(path, sizeof(path), "backend/vbd/%s", names + at))
            continue;
        long inner = store_list(path, more_names, sizeof(more_names));
        for (long from = 0; from < inner; from += strlen(more_names + from) + 1)
            found(names + at, more_names + from);
    }
    if (size < 0 && size != -XEN_ENOENT)
        return;
    for (unsigned i = 0; i < MAX_DISKS; i++)
        if (disks[i].used && !disks[i].present)
            disks[i].gone = work = true;
}

void disk_event(const char *path, const char *token)
{
    const char *at = token;
    uint64_t place;
    work = true;
    if (number(&at, MAX_DISKS - 1, &place) && !*at) {
        disks[place].changed = true;
        return;
    }
    /* Below backend/vbd: a disk's directory comes or goes, or the toolstack wrote into one. */
    const char *last = path;
    unsigned depth = 0;
    for (at = path; *at; at++)
        if (*at == '/') {
            depth++;
            last = at + 1;
        }
    if (depth < 4 || !strcmp(last, "discard-enable"))
        scan_wanted = true;
    else if (!strcmp(last, "online"))
        for (unsigned i = 0; i < MAX_DISKS; i++)
            disks[i].changed = disks[i].used;
}
