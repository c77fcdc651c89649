/* One NVMe controller (NVM Express 1.4): one admin and one I/O queue pair, in the domain's own memory, one interrupt vector for both. */
#include "domio.h"

#define CAP 0x00
#define CC 0x14
#define CSTS 0x1C
#define AQA 0x24
#define ASQ 0x28
#define ACQ 0x30
#define DOORBELLS 0x1000
#define CC_ENABLE 1u
#define CC_SIZES (6u << 16 | 4u << 20) /* entries of 64 and 16 bytes; pages of 4 KiB */
#define CSTS_READY 1u
#define CSTS_FATAL 2u
#define GONE 0xFFFFFFFFu

#define ADMIN_DEPTH 16
#define ADMIN_CREATE_SQ 1
#define ADMIN_GET_LOG 2
#define ADMIN_CREATE_CQ 5
#define ADMIN_IDENTIFY 6
#define ADMIN_SET_FEATURES 9
#define FEATURE_QUEUES 7
#define LOG_SMART (2 | 1u << 15 | 127u << 16) /* 512 bytes; events stay */
#define SMART_UNSAFE_SHUTDOWNS 144
#define MIN_DEPTH 16

#define LOOK (100 * NS_MS)
#define AGAIN (250 * NS_MS)
#define COMMAND_TIME (5 * NS_S)
#define MAX_TRANSFER (1u << 20)

struct command {
    uint32_t opcode_id, namespace, reserved[2];
    uint64_t metadata, prp1, prp2;
    uint32_t dwords[6]; /* 10 to 15 */
};

struct completion {
    uint32_t result, reserved;
    uint16_t head, queue, id, status; /* status: bit 0 is the phase */
};

static struct disk_pages *pages(struct disk *disk) { return &pages_of[disk->place]; }

static uint32_t get(struct nvme *nvme, unsigned at) { return *(volatile uint32_t *)(nvme->registers + at); }
static void put(struct nvme *nvme, unsigned at, uint32_t value) { *(volatile uint32_t *)(nvme->registers + at) = value; }

static void put_wide(struct nvme *nvme, unsigned at, uint64_t value)
{
    put(nvme, at, (uint32_t)value);
    put(nvme, at + 4, value >> 32);
}

static bool fail(struct disk *disk, uint64_t now, const char *why)
{
    struct nvme *nvme = &disk->nvme;
    if (!nvme->told)
        say("domio: controller %02x: %s", nvme->bdf >> 3, why);
    nvme->told = true;
    nvme->state = NVME_OFF;
    nvme->deadline = now + AGAIN;
    return false;
}

static void admin(struct disk *disk, uint64_t now, unsigned opcode, uint32_t nsid, uint64_t prp1, uint32_t d10, uint32_t d11)
{
    struct nvme *nvme = &disk->nvme;
    struct command *entry = (struct command *)pages(disk)->admin_submission + nvme->admin_tail;
    memset(entry, 0, sizeof(*entry));
    entry->opcode_id = opcode | ++nvme->admin_id << 16;
    entry->namespace = nsid;
    entry->prp1 = prp1;
    entry->dwords[0] = d10;
    entry->dwords[1] = d11;
    barrier();
    nvme->admin_tail = (nvme->admin_tail + 1) % ADMIN_DEPTH;
    nvme->deadline = now + COMMAND_TIME;
    put(nvme, DOORBELLS, nvme->admin_tail);
}

/* -1: not yet; else the status. */
static int admin_done(struct disk *disk)
{
    struct nvme *nvme = &disk->nvme;
    volatile struct completion *entry = (volatile struct completion *)pages(disk)->admin_completion + nvme->admin_head;
    unsigned status = entry->status;
    if ((status & 1) != nvme->admin_phase)
        return -1;
    barrier();
    bool mine = entry->id == (nvme->admin_id & 0xFFFF);
    nvme->admin_head = (nvme->admin_head + 1) % ADMIN_DEPTH;
    if (!nvme->admin_head)
        nvme->admin_phase ^= 1;
    put(nvme, DOORBELLS + nvme->stride, nvme->admin_head);
    return mine ? (int)(status >> 1) : -1;
}

/* Find it on the bus, show its registers, and have it reset. */
static bool begin(struct disk *disk, uint64_t now)
{
    struct nvme *nvme = &disk->nvme;
    unsigned bdf = nvme->bdf;
    nvme->deadline = now + LOOK;
    if (pci_read(bdf, 0, 2) == 0xFFFF)
        return false; /* not there yet */
    if (pci_read(bdf, PCI_CLASS, 4) >> 8 != PCI_CLASS_NVME)
        return fail(disk, now, "is no NVMe controller");
    uint32_t command = pci_read(bdf, PCI_COMMAND, 2), low = pci_read(bdf, PCI_BAR0, 4);
    if ((low & 7) != 4)
        return fail(disk, now, "its BAR 0 is not of 64 bits");
    uint64_t address = (uint64_t)pci_read(bdf, PCI_BAR0 + 4, 4) << 32 | (low & ~15u);
    pci_write(bdf, PCI_COMMAND, 2, command & ~PCI_MEMORY);
    pci_write(bdf, PCI_BAR0, 4, 0xFFFFFFFF);
    uint64_t size = ~(uint64_t)(pci_read(bdf, PCI_BAR0, 4) & ~15u) + 1;
    size &= 0xFFFFFFFF;
    pci_write(bdf, PCI_BAR0, 4, low);
    pci_write(bdf, PCI_COMMAND, 2, command | PCI_MEMORY | PCI_MASTER);
    if (size < 2 * PAGE_SIZE || address & (PAGE_SIZE - 1))
        return fail(disk, now, "its registers are in no place");
    unsigned shown = size / PAGE_SIZE < REGISTER_PAGES ? size / PAGE_SIZE : REGISTER_PAGES;
    if (map_registers(pages(disk)->registers, address, shown))
        return fail(disk, now, "its registers cannot be mapped");
    nvme->registers = (volatile uint8_t *)pages(disk)->registers;
    uint32_t first = get(nvme, CAP), second = get(nvme, CAP + 4);
    if (first == GONE && second == GONE)
        return false;
    nvme->stride = 4u << (second & 15);
    if ((first & 0xFFFF) + 1 < MIN_DEPTH || (second >> 16 & 15) || DOORBELLS + 4 * nvme->stride > shown * PAGE_SIZE)
        return fail(disk, now, "wants other queues or pages");
    nvme->free_count = (first & 0xFFFF) + 1 < QUEUE_DEPTH ? (first & 0xFFFF) + 1 : QUEUE_DEPTH;
    if (!nvme->port) {
        long port = bind_vector(bdf, 0);
        if (port < 0)
            return fail(disk, now, "its interrupt cannot be bound");
        nvme->port = port;
        extern void disk_interrupt(evtchn_port_t port);
        on_port(port, disk_interrupt);
        port_unmask(port);
    }
    put(nvme, CC, 0);
    nvme->deadline = now + (uint64_t)(first >> 24) * 500 * NS_MS + NS_S;
    nvme->state = NVME_RESETTING;
    return false;
}

static void enable(struct disk *disk, uint64_t now)
{
    struct nvme *nvme = &disk->nvme;
    struct disk_pages *own = pages(disk);
    memset(own->admin_completion, 0, PAGE_SIZE);
    memset(own->completion, 0, PAGE_SIZE);
    nvme->admin_tail = nvme->admin_head = 0;
    nvme->admin_phase = nvme->phase = 1;
    nvme->tail = nvme->head = 0;
    nvme->unrung = false;
    put(nvme, AQA, (ADMIN_DEPTH - 1) << 16 | (ADMIN_DEPTH - 1));
    put_wide(nvme, ASQ, bus_address(own->admin_submission));
    put_wide(nvme, ACQ, bus_address(own->admin_completion));
    put(nvme, CC, CC_SIZES | CC_ENABLE);
    nvme->deadline = now + 10 * NS_S;
    nvme->state = NVME_ENABLING;
}

static bool take_namespace(struct disk *disk, uint64_t now)
{
    struct nvme *nvme = &disk->nvme;
    const uint8_t *data = (const uint8_t *)pages(disk)->identify;
    uint64_t blocks;
    memcpy(&blocks, data, 8);
    unsigned shift = data[128 + 4 * (data[26] & 15) + 2];
    if (shift != 9)
        return fail(disk, now, "has blocks of other than 512 bytes");
    if (blocks >> 55)
        return fail(disk, now, "is too large");
    nvme->sectors = blocks;
    return true;
}

static void ready(struct nvme *nvme, uint64_t now)
{
    unsigned depth = nvme->free_count; /* one entry of a queue stays empty */
    nvme->free_count = 0;
    memset(nvme->commands, 0, sizeof(nvme->commands));
    for (unsigned id = depth - 1; id-- > 0;)
        nvme->free_ids[nvme->free_count++] = id;
    nvme->state = NVME_READY;
    nvme->told = false;
    nvme->deadline = now + LOOK;
}

bool nvme_step(struct disk *disk, uint64_t now)
{
    struct nvme *nvme = &disk->nvme;
    struct disk_pages *own = pages(disk);
    int status;
    switch (nvme->state) {
    case NVME_OFF:
        return now >= nvme->deadline ? begin(disk, now) : false;
    case NVME_RESETTING:
    case NVME_ENABLING: {
        uint32_t csts = get(nvme, CSTS);
        bool up = csts & CSTS_READY;
        if (csts == GONE)
            return fail(disk, now, "went away");
        if (up != (nvme->state == NVME_ENABLING) && !(csts & CSTS_FATAL && up))
            return now > nvme->deadline ? fail(disk, now, "does not come up") : false;
        if (nvme->state == NVME_RESETTING) {
            enable(disk, now);
            return false;
        }
        nvme->state = NVME_CONTROLLER;
        admin(disk, now, ADMIN_IDENTIFY, 0, bus_address(own->identify), 1, 0);
        return false;
    }
    case NVME_READY: {
        if (now < nvme->deadline)
            return false;
        nvme->deadline = now + LOOK;
        uint32_t csts = get(nvme, CSTS);
        if ((csts & (CSTS_READY | CSTS_FATAL)) != CSTS_READY || csts == GONE) {
            fail(disk, now, "was reset");
            nvme->deadline = now;
        }
        return false;
    }
    default:
        break;
    }
    status = admin_done(disk);
    if (status < 0) {
        if (now <= nvme->deadline)
            return false;
        return fail(disk, now, "does not answer");
    }
    if (status)
        return fail(disk, now, "refuses a command");
    unsigned depth = nvme->free_count;
    switch (nvme->state) {
    case NVME_CONTROLLER: {
        const uint8_t *data = (const uint8_t *)own->identify;
        unsigned shift = data[77];
        nvme->max_bytes = shift && shift < 8 ? (uint32_t)PAGE_SIZE << shift : MAX_TRANSFER;
        nvme->can_discard = data[520] & 4;
        nvme->write_cache = data[525] & 1;
        nvme->state = NVME_NAMESPACE;
        admin(disk, now, ADMIN_IDENTIFY, 1, bus_address(own->identify), 0, 0);
        return false;
    }
    case NVME_NAMESPACE:
        if (!take_namespace(disk, now))
            return false;
        nvme->state = NVME_LOG;
        admin(disk, now, ADMIN_GET_LOG, 0xFFFFFFFF, bus_address(own->identify), LOG_SMART, 0);
        return false;
    case NVME_LOG:
        memcpy(&nvme->power_losses, own->identify + SMART_UNSAFE_SHUTDOWNS, 4);
        nvme->state = NVME_QUEUES;
        admin(disk, now, ADMIN_SET_FEATURES, 0, 0, FEATURE_QUEUES, 0);
        return false;
    case NVME_QUEUES:
        nvme->state = NVME_CQ;
        admin(disk, now, ADMIN_CREATE_CQ, 0, bus_address(own->completion), (depth - 1) << 16 | 1, 3 /* contiguous, vector 0 */);
        return false;
    case NVME_CQ:
        nvme->state = NVME_SQ;
        admin(disk, now, ADMIN_CREATE_SQ, 0, bus_address(own->submission), (depth - 1) << 16 | 1, 1 << 16 | 1);
        return false;
    default:
        nvme->depth = depth;
        ready(nvme, now);
        return true;
    }
}

bool nvme_submit(struct disk *disk, struct request *request, unsigned opcode, uint64_t prp1, uint64_t prp2, uint64_t block, uint32_t dword12,
                 uint32_t dword10, uint32_t dword11)
{
    struct nvme *nvme = &disk->nvme;
    if (nvme->state != NVME_READY || !nvme->free_count)
        return false;
    unsigned id = nvme->free_ids[--nvme->free_count];
    nvme->commands[id] = request;
    struct command *entry = (struct command *)pages(disk)->submission + nvme->tail;
    memset(entry, 0, sizeof(*entry));
    entry->opcode_id = opcode | id << 16;
    entry->namespace = 1;
    entry->prp1 = prp1;
    entry->prp2 = prp2;
    entry->dwords[0] = opcode == NVME_DATASET ? dword10 : (uint32_t)block;
    entry->dwords[1] = opcode == NVME_DATASET ? dword11 : (uint32_t)(block >> 32);
    entry->dwords[2] = dword12;
    barrier();
    nvme->tail = (nvme->tail + 1) % nvme->depth;
    request->outstanding++;
    nvme->unrung = true;
    return true;
}

void nvme_ring_doorbell(struct disk *disk)
{
    struct nvme *nvme = &disk->nvme;
    if (nvme->state != NVME_READY || !nvme->unrung)
        return;
    nvme->unrung = false;
    put(nvme, DOORBELLS + 2 * nvme->stride, nvme->tail);
}

bool nvme_completions(struct disk *disk, void (*on_done)(struct disk *disk, struct request *request, bool fine))
{
    struct nvme *nvme = &disk->nvme;
    bool any = false;
    while (nvme->state == NVME_READY) {
        volatile struct completion *entry = (volatile struct completion *)pages(disk)->completion + nvme->head;
        unsigned status = entry->status, id = entry->id;
        if ((status & 1) != nvme->phase)
            break;
        barrier();
        nvme->head = (nvme->head + 1) % nvme->depth;
        if (!nvme->head)
            nvme->phase ^= 1;
        any = true;
        struct request *request = id < QUEUE_DEPTH ? nvme->commands[id] : NULL;
        if (!request)
            continue; /* the device made it up */
        nvme->commands[id] = NULL;
        nvme->free_ids[nvme->free_count++] = id;
        on_done(disk, request, !(status >> 1));
    }
    if (any)
        put(nvme, DOORBELLS + 3 * nvme->stride, nvme->head);
    return any;
}
