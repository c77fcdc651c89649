/* A block front end that means ill now and then: what a back end must do with good and with bad requests (io/blkif.h).
 *
 * Its disk xvda is writable, of at least 8 MiB, and each sector begins with its number (64 bits). It writes from sector 8192 on.
 */
#include <guest.h>
#include <xen/io/blkif.h>
#include <xen/io/xenbus.h>

const char program_name[] = "blkfront";

#define FRONT "device/vbd/51712"
#define SECTOR 512
#define PAGES 64
#define FIRST_REF 8
#define RING_REFS (FIRST_REF + PAGES)
#define INDIRECT_REF (RING_REFS + 8)
#define READ_ONLY_REF (INDIRECT_REF + 1)
#define NO_REF (INDIRECT_REF + 2)
#define OWN 8192ul /* sectors from here on are ours to write */
#define WAIT 40000000000ul
#define MAX_IDS 256

static char data[PAGES][PAGE_SIZE] PAGE_ALIGNED, ring_pages[4][PAGE_SIZE] PAGE_ALIGNED, indirect[PAGE_SIZE] PAGE_ALIGNED;
static char grant_page[PAGE_SIZE] PAGE_ALIGNED, locked[PAGE_SIZE] PAGE_ALIGNED;
static volatile grant_entry_v1_t *grants;
static char backend[128];
static domid_t backend_id;
static blkif_front_ring_t ring;
static evtchn_port_t port;
static uint64_t sectors;
static int16_t statuses[MAX_IDS];
static unsigned answers[MAX_IDS];

static void grant(grant_ref_t ref, const void *page, uint16_t flags)
{
    grants[ref].domid = backend_id;
    grants[ref].frame = (uint32_t)virt_to_mfn(page);
    barrier();
    grants[ref].flags = GTF_permit_access | flags;
}

static void set_up_grants(void)
{
    xen_pfn_t frame;
    struct gnttab_setup_table setup = {.dom = DOMID_SELF, .nr_frames = 1};
    set_xen_guest_handle(setup.frame_list, &frame);
    HYPERVISOR_grant_table_op(GNTTABOP_setup_table, &setup, 1);
    same(set_pte(grant_page, (uint64_t)frame << PAGE_SHIFT | PTE_RW), 0, "the grant table is mapped");
    grants = (volatile grant_entry_v1_t *)grant_page;
    for (unsigned i = 0; i < PAGES; i++)
        grant(FIRST_REF + i, data[i], 0);
    for (unsigned i = 0; i < 4; i++)
        grant(RING_REFS + i, ring_pages[i], 0);
    grant(INDIRECT_REF, indirect, GTF_readonly);
    grant(READ_ONLY_REF, locked, GTF_readonly);
}

/* --- xenstore --- */

static void join(char *out, const char *base, const char *name)
{
    memcpy(out, base, strlen(base));
    out += strlen(base);
    *out++ = '/';
    memcpy(out, name, strlen(name) + 1);
}

static uint64_t value_of(const char *text)
{
    uint64_t value = 0;
    for (; *text >= '0' && *text <= '9'; text++)
        value = value * 10 + *text - '0';
    return value;
}

static uint64_t node(const char *base, const char *name)
{
    char path[256], text[64] = "";
    join(path, base, name);
    return xenstore_read(path, text, sizeof(text)) < 0 ? 0 : value_of(text);
}

static void put(const char *name, uint64_t value)
{
    char path[256], text[24], *at = text + sizeof(text);
    join(path, FRONT, name);
    *--at = 0;
    do
        *--at = '0' + value % 10;
    while (value /= 10);
    xenstore_write(path, at);
}

static bool backend_reaches(uint64_t state, uint64_t other)
{
    uint64_t deadline = system_time() + WAIT, now;
    static volatile bool never;
    while ((now = system_time()) < deadline) {
        uint64_t found = node(backend, "state");
        if (found == state || found == other)
            return true;
        wait_for(&never, 10000000);
    }
    return false;
}

/* --- the ring --- */

static void on_answer(evtchn_port_t which) { (void)which; }

static bool take_answers(void)
{
    bool any = false;
    for (;;) {
        RING_IDX produced = ring.sring->rsp_prod;
        if (produced - ring.rsp_cons > ring.nr_ents)
            return any;
        barrier();
        for (; ring.rsp_cons != produced; ring.rsp_cons++, any = true) {
            blkif_response_t response = *RING_GET_RESPONSE(&ring, ring.rsp_cons);
            if (response.id < MAX_IDS) {
                answers[response.id]++;
                statuses[response.id] = response.status;
            }
        }
        ring.sring->rsp_event = ring.rsp_cons + 1;
        __asm__ volatile("mfence" ::: "memory");
        if (ring.sring->rsp_prod == ring.rsp_cons)
            return any;
    }
}

static void push(void)
{
    int wanted;
    barrier();
    RING_IDX old = ring.sring->req_prod, new = ring.req_prod_pvt;
    *(volatile RING_IDX *)&ring.sring->req_prod = new;
    __asm__ volatile("mfence" ::: "memory");
    wanted = new - ring.sring->req_event < new - old;
    if (wanted)
        notify(port);
}

static bool wait_answers(unsigned first, unsigned count)
{
    uint64_t deadline = system_time() + WAIT;
    static volatile bool never;
    for (;;) {
        take_answers();
        unsigned got = 0;
        for (unsigned i = 0; i < count; i++)
            got += answers[first + i] != 0;
        if (got == count)
            return true;
        if (system_time() > deadline)
            return false;
        wait_for(&never, 1000000);
    }
}

static blkif_request_t *next(unsigned id)
{
    blkif_request_t *request = RING_GET_REQUEST(&ring, ring.req_prod_pvt);
    ring.req_prod_pvt++;
    memset(request, 0, sizeof(*request));
    request->id = id;
    answers[id] = 0;
    statuses[id] = 77;
    return request;
}

/* One request by itself: its status, or 100 if no answer came, 101 if there were several. */
static int run(blkif_request_t *request)
{
    unsigned id = request->id;
    push();
    if (!wait_answers(id, 1))
        return 100;
    return answers[id] == 1 ? statuses[id] : 101;
}

static int transfer(unsigned op, uint64_t sector, unsigned segments, unsigned first, unsigned last)
{
    blkif_request_t *request = next(1);
    request->operation = op;
    request->nr_segments = segments;
    request->sector_number = sector;
    for (unsigned i = 0; i < segments && i < BLKIF_MAX_SEGMENTS_PER_REQUEST; i++)
        request->seg[i] = (struct blkif_request_segment){.gref = FIRST_REF + i, .first_sect = first, .last_sect = last};
    return run(request);
}

static int indirect_transfer(unsigned op, uint64_t sector, unsigned segments, grant_ref_t ref)
{
    blkif_request_indirect_t *request = (blkif_request_indirect_t *)next(2);
    struct blkif_request_segment *list = (struct blkif_request_segment *)indirect;
    request->operation = BLKIF_OP_INDIRECT;
    request->indirect_op = op;
    request->nr_segments = segments;
    request->sector_number = sector;
    request->indirect_grefs[0] = ref;
    for (unsigned i = 0; i < segments && i < PAGE_SIZE / 8; i++)
        list[i] = (struct blkif_request_segment){.gref = FIRST_REF + i % PAGES, .first_sect = 0, .last_sect = 7};
    return run((blkif_request_t *)request);
}

static int discard(uint64_t sector, uint64_t count)
{
    blkif_request_discard_t *request = (blkif_request_discard_t *)next(3);
    request->operation = BLKIF_OP_DISCARD;
    request->sector_number = sector;
    request->nr_sectors = count;
    return run((blkif_request_t *)request);
}

static bool numbered(const void *page, uint64_t sector)
{
    for (unsigned i = 0; i < PAGE_SIZE / SECTOR; i++)
        if (*(const uint64_t *)((const char *)page + i * SECTOR) != sector + i)
            return false;
    return true;
}

/* --- connections --- */

static void connect(unsigned order, bool persistent)
{
    ok(backend_reaches(XenbusStateInitWait, XenbusStateInitWait), "the back end waits for us");
    struct evtchn_alloc_unbound alloc = {.dom = DOMID_SELF, .remote_dom = backend_id};
    same(HYPERVISOR_event_channel_op(EVTCHNOP_alloc_unbound, &alloc), 0, "an event channel");
    port = alloc.port;
    on_port(port, on_answer);
    port_unmask(port);
    memset(ring_pages, 0, sizeof(ring_pages));
    SHARED_RING_INIT((blkif_sring_t *)ring_pages);
    FRONT_RING_INIT(&ring, (blkif_sring_t *)ring_pages, PAGE_SIZE << order);
    put("ring-page-order", order);
    if (order) {
        for (unsigned i = 0; i < 1u << order; i++) {
            char name[] = "ring-ref0";
            name[8] = '0' + i;
            put(name, RING_REFS + i);
        }
    } else
        put("ring-ref", RING_REFS);
    put("event-channel", port);
    put("feature-persistent", persistent);
    xenstore_write(FRONT "/protocol", "x86_64-abi");
    put("state", XenbusStateInitialised);
    ok(backend_reaches(XenbusStateConnected, XenbusStateConnected), "the back end connects");
    put("state", XenbusStateConnected);
    sectors = node(backend, "sectors");
    ok(sectors >= 16384, "%lu sectors", sectors);
    same(node(backend, "sector-size"), SECTOR, "of 512 bytes");
}

static void disconnect(void)
{
    put("state", XenbusStateClosing);
    ok(backend_reaches(XenbusStateClosing, XenbusStateClosed), "the back end closes");
    put("state", XenbusStateClosed);
    ok(backend_reaches(XenbusStateClosed, XenbusStateClosed), "it is closed");
    for (unsigned i = 0; i < 4; i++)
        same(grants[RING_REFS + i].flags & (GTF_reading | GTF_writing), 0, "ring page %u is let go of", i);
    struct evtchn_close close = {.port = port};
    HYPERVISOR_event_channel_op(EVTCHNOP_close, &close);
}

/* --- what is asked --- */

static void good(void)
{
    same(transfer(BLKIF_OP_READ, 80, 11, 0, 7), BLKIF_RSP_OKAY, "read 11 pages");
    bool right = true;
    for (unsigned i = 0; i < 11; i++)
        right &= numbered(data[i], 80 + 8 * i);
    ok(right, "all of them are right");
    memset(data[0], 0xEE, PAGE_SIZE);
    same(transfer(BLKIF_OP_READ, 1000, 1, 3, 4), BLKIF_RSP_OKAY, "read two sectors into the middle of a page");
    ok(*(uint64_t *)(data[0] + 3 * SECTOR) == 1000 && *(uint64_t *)(data[0] + 4 * SECTOR) == 1001, "they are there");
    ok((uint8_t)data[0][3 * SECTOR - 1] == 0xEE && (uint8_t)data[0][5 * SECTOR] == 0xEE, "and nothing is around them");
    for (unsigned i = 0; i < 11; i++) {
        memset(data[i], 0x10 + i, PAGE_SIZE);
    }
    same(transfer(BLKIF_OP_WRITE, OWN, 11, 1, 5), BLKIF_RSP_OKAY, "write 11 pieces that are no whole pages");
    for (unsigned i = 0; i < 11; i++)
        memset(data[i], 0, PAGE_SIZE);
    same(transfer(BLKIF_OP_READ, OWN, 7, 0, 7), BLKIF_RSP_OKAY, "read them back");
    right = true;
    for (unsigned i = 0; i < 55; i++)
        right &= (uint8_t)data[i / 8][i % 8 * SECTOR + 17] == 0x10 + i / 5;
    ok(right, "each piece is where it belongs");
    memset(data[0], 0x42, PAGE_SIZE);
    same(transfer(BLKIF_OP_FLUSH_DISKCACHE, 0, 0, 0, 0), BLKIF_RSP_OKAY, "flush");
    same(transfer(BLKIF_OP_FLUSH_DISKCACHE, OWN + 100, 1, 0, 7), BLKIF_RSP_OKAY, "flush with data");
    same(transfer(BLKIF_OP_WRITE_BARRIER, OWN + 108, 1, 0, 7), BLKIF_RSP_OKAY, "barrier with data");
    memset(data[0], 0, PAGE_SIZE);
    same(transfer(BLKIF_OP_READ, OWN + 108, 1, 0, 7), BLKIF_RSP_OKAY, "read that back");
    ok(data[0][4095] == 0x42, "it was written");
    same(indirect_transfer(BLKIF_OP_READ, 2048, 64, INDIRECT_REF), BLKIF_RSP_OKAY, "indirect: read 64 pages");
    right = true;
    for (unsigned i = 0; i < 64; i++)
        right &= numbered(data[i], 2048 + 8 * i);
    ok(right, "all of them are right");
    same(indirect_transfer(BLKIF_OP_WRITE, OWN + 1024, 64, INDIRECT_REF), BLKIF_RSP_OKAY, "indirect: write 64 pages");
    memset(data, 0, sizeof(data));
    same(transfer(BLKIF_OP_READ, OWN + 1024 + 63 * 8, 1, 0, 7), BLKIF_RSP_OKAY, "read the last of them");
    ok(numbered(data[0], 2048 + 63 * 8), "it was written");
    if (node(backend, "feature-discard"))
        same(discard(OWN + 4096, 64), BLKIF_RSP_OKAY, "discard");
    else
        skip("discard", "not offered");
}

static void bad(void)
{
    same(transfer(BLKIF_OP_READ, 0, 1, 5, 4), BLKIF_RSP_ERROR, "a segment that ends before it begins");
    same(transfer(BLKIF_OP_READ, 0, 1, 0, 8), BLKIF_RSP_ERROR, "a segment beyond its page");
    same(transfer(BLKIF_OP_READ, 0, 12, 0, 7), BLKIF_RSP_ERROR, "12 segments");
    same(transfer(BLKIF_OP_READ, 0, 255, 0, 7), BLKIF_RSP_ERROR, "255 segments");
    same(transfer(BLKIF_OP_READ, 0, 0, 0, 0), BLKIF_RSP_ERROR, "a read of nothing");
    same(transfer(BLKIF_OP_READ, sectors, 1, 0, 0), BLKIF_RSP_ERROR, "the sector behind the last");
    same(transfer(BLKIF_OP_READ, sectors - 7, 1, 0, 7), BLKIF_RSP_ERROR, "a read over the end");
    same(transfer(BLKIF_OP_READ, ~0ul - 3, 1, 0, 7), BLKIF_RSP_ERROR, "sectors that wrap around");
    same(transfer(BLKIF_OP_READ, ~0ul / SECTOR + 1, 1, 0, 7), BLKIF_RSP_ERROR, "bytes that wrap around");
    same(transfer(99, 0, 1, 0, 7), BLKIF_RSP_EOPNOTSUPP, "an operation that there is not");
    blkif_request_t *request = next(4);
    request->operation = BLKIF_OP_WRITE;
    request->nr_segments = 1;
    request->sector_number = OWN;
    request->seg[0] = (struct blkif_request_segment){.gref = NO_REF, .last_sect = 7};
    same(run(request), BLKIF_RSP_ERROR, "a grant that grants nothing");
    request = next(5);
    request->operation = BLKIF_OP_READ;
    request->nr_segments = 1;
    request->seg[0] = (struct blkif_request_segment){.gref = 0x7FFFFFFF, .last_sect = 7};
    same(run(request), BLKIF_RSP_ERROR, "a grant that cannot be");
    request = next(6);
    request->operation = BLKIF_OP_READ;
    request->nr_segments = 1;
    request->seg[0] = (struct blkif_request_segment){.gref = READ_ONLY_REF, .last_sect = 7};
    same(run(request), BLKIF_RSP_ERROR, "a read into a page that may only be read");
    request = next(7);
    request->operation = BLKIF_OP_READ;
    request->nr_segments = 2;
    request->seg[0] = (struct blkif_request_segment){.gref = FIRST_REF, .last_sect = 7};
    request->seg[1] = (struct blkif_request_segment){.gref = NO_REF, .last_sect = 7};
    same(run(request), BLKIF_RSP_ERROR, "one good grant and one bad");
    same(grants[FIRST_REF].flags & (GTF_reading | GTF_writing), 0, "the good one is let go of");
    same(indirect_transfer(BLKIF_OP_READ, 0, 257, INDIRECT_REF), BLKIF_RSP_ERROR, "257 indirect segments");
    same(indirect_transfer(BLKIF_OP_READ, 0, 0, INDIRECT_REF), BLKIF_RSP_ERROR, "no indirect segment");
    same(indirect_transfer(BLKIF_OP_FLUSH_DISKCACHE, 0, 1, INDIRECT_REF), BLKIF_RSP_ERROR, "an indirect flush");
    same(indirect_transfer(BLKIF_OP_READ, 0, 1, NO_REF), BLKIF_RSP_ERROR, "descriptors that are not granted");
    if (node(backend, "feature-discard")) {
        same(discard(sectors - 1, 2), BLKIF_RSP_ERROR, "a discard over the end");
        same(discard(~0ul, 2), BLKIF_RSP_ERROR, "a discard that wraps around");
    } else
        skip("bad discards", "not offered");
    same(transfer(BLKIF_OP_READ, 16, 1, 0, 7), BLKIF_RSP_OKAY, "a good read after all that");
    ok(numbered(data[0], 16), "is right");
}

/* As many as the ring holds, at once and again: each is answered once. */
static void many(unsigned rounds)
{
    unsigned count = ring.nr_ents < MAX_IDS ? ring.nr_ents : MAX_IDS;
    bool once = true, fine = true, right = true;
    for (unsigned round = 0; round < rounds; round++) {
        for (unsigned i = 0; i < count; i++) {
            blkif_request_t *request = next(i);
            request->operation = BLKIF_OP_READ;
            request->nr_segments = 1;
            request->sector_number = 8 * (i % PAGES) + 512 * round;
            request->seg[0] = (struct blkif_request_segment){.gref = FIRST_REF + i % PAGES, .last_sect = 7};
        }
        push();
        fine &= wait_answers(0, count);
        for (unsigned i = 0; i < count; i++) {
            once &= answers[i] == 1;
            fine &= statuses[i] == BLKIF_RSP_OKAY;
            right &= numbered(data[i % PAGES], 8 * (i % PAGES) + 512 * round);
        }
    }
    ok(fine, "%u rounds of %u requests at once", rounds, count);
    ok(once, "each is answered once");
    ok(right, "with the right data");
}

static void all(unsigned op, unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        blkif_request_t *request = next(i);
        request->operation = op;
        request->nr_segments = 1;
        request->sector_number = OWN + 8 * i;
        request->seg[0] = (struct blkif_request_segment){.gref = FIRST_REF + i, .last_sect = 7};
    }
    push();
}

/* Writes, a flush and reads, while others break the back end or its device: none fails, each is answered once, and all is there. */
static void endure(unsigned rounds)
{
    const unsigned count = 32;
    for (unsigned round = 1; round <= rounds; round++) {
        bool answered, once = true, fine = true, right = true;
        for (unsigned i = 0; i < count; i++)
            for (unsigned at = 0; at < PAGE_SIZE; at += 8)
                *(uint64_t *)(data[i] + at) = (uint64_t)round << 32 | i << 16 | at;
        all(BLKIF_OP_WRITE, count);
        blkif_request_t *request = next(count);
        request->operation = BLKIF_OP_FLUSH_DISKCACHE;
        push();
        answered = wait_answers(0, count + 1);
        for (unsigned i = 0; i <= count; i++) {
            once &= answers[i] == 1;
            fine &= statuses[i] == BLKIF_RSP_OKAY;
        }
        memset(data, 0, sizeof(data));
        all(BLKIF_OP_READ, count);
        answered &= wait_answers(0, count);
        for (unsigned i = 0; i < count; i++) {
            once &= answers[i] == 1;
            fine &= statuses[i] == BLKIF_RSP_OKAY;
            for (unsigned at = 0; at < PAGE_SIZE; at += 8)
                right &= *(uint64_t *)(data[i] + at) == ((uint64_t)round << 32 | i << 16 | at);
        }
        ok(answered && once && fine && right, "round %u: answered %d, once %d, without error %d, as written %d", round, answered, once, fine, right);
    }
}

/* Others cut the power of the device while a write is answered and not flushed. */
static void power(void)
{
    static volatile bool never;
    char text[8];
    uint64_t deadline = system_time() + WAIT;
    same(transfer(BLKIF_OP_WRITE, OWN, 1, 0, 7), BLKIF_RSP_OKAY, "write");
    note("now");
    while (xenstore_read("data/go", text, sizeof(text)) < 1 && system_time() < deadline)
        wait_for(&never, 10000000);
    same(transfer(BLKIF_OP_FLUSH_DISKCACHE, 0, 0, 0, 0), BLKIF_RSP_ERROR, "the next flush says that answered writes are gone");
    same(transfer(BLKIF_OP_WRITE, OWN, 1, 0, 7), BLKIF_RSP_ERROR, "and so does the next write");
    same(transfer(BLKIF_OP_WRITE, OWN, 1, 0, 7), BLKIF_RSP_OKAY, "once");
    same(transfer(BLKIF_OP_FLUSH_DISKCACHE, 0, 0, 0, 0), BLKIF_RSP_OKAY, "each");
    same(transfer(BLKIF_OP_READ, OWN, 1, 0, 7), BLKIF_RSP_OKAY, "read");
}

/* New code in pages that held other code runs as read, by whole pages, single sectors into the middle of a page, and indirect requests. */
static void code(unsigned rounds)
{
    unsigned wrong = 0, failed = 0;
    for (unsigned k = 0; k < PAGES; k++)
        for (unsigned s = 0; s < PAGE_SIZE / SECTOR; s++) {
            unsigned char *at = (unsigned char *)data[k] + s * SECTOR;
            memset(at, 0x90, SECTOR);
            at += k % 5; /* nop */
            *at++ = 0xB8; /* mov eax, number; ret */
            *(uint32_t *)at = 0x10000 + 8 * k + s;
            at[4] = 0xC3;
        }
    same(indirect_transfer(BLKIF_OP_WRITE, OWN, PAGES, INDIRECT_REF), BLKIF_RSP_OKAY, "the code is written");
    for (unsigned round = 0; round < rounds; round++) {
        unsigned k = round * 7 % PAGES, s = round % 8, place = s;
        int status;
        if (round % 3 == 0)
            status = transfer(BLKIF_OP_READ, OWN + 8 * k, 1, 0, 7);
        else if (round % 3 == 1)
            status = transfer(BLKIF_OP_READ, OWN + 8 * k + s, 1, place = 3, 3);
        else
            status = indirect_transfer(BLKIF_OP_READ, OWN + 8 * k, 1, INDIRECT_REF);
        failed += status != BLKIF_RSP_OKAY;
        const char *at = data[0] + place * SECTOR;
        unsigned ran = ((unsigned (*)(void))(const void *)at)(), there = *(const uint32_t *)(at + k % 5 + 1);
        if (ran != 0x10000 + 8 * k + s && !wrong++)
            note("round %u: %x ran, %x is there, %x was read", round, ran, there, 0x10000 + 8 * k + s);
    }
    same(failed, 0, "%u reads of code", rounds);
    same(wrong, 0, "it runs as read, each time");
}

void program(void)
{
    const char *line = (const char *)start_info->cmd_line;
    char text[16] = "";
    xenstore_read(FRONT "/backend", backend, sizeof(backend));
    xenstore_read(FRONT "/backend-id", text, sizeof(text));
    backend_id = value_of(text);
    ok(backend_id != 0, "domain %u serves the disk", backend_id);
    set_up_grants();
    if (!memcmp(line, "endure=", 7)) {
        connect(1, line[7] == 'p');
        endure(value_of(line + 8));
        disconnect();
        return;
    }
    if (!memcmp(line, "power", 5)) {
        connect(0, false);
        power();
        disconnect();
        return;
    }
    if (!memcmp(line, "code=", 5)) {
        connect(0, line[5] == 'p');
        code(value_of(line + 6));
        disconnect();
        return;
    }
    connect(0, false);
    good();
    bad();
    many(4);
    disconnect();
    put("state", XenbusStateInitialising);
    connect(2, true);
    many(4);
    ok(grants[FIRST_REF].flags & GTF_writing, "a persistent grant stays mapped");
    good();
    disconnect();
    same(grants[FIRST_REF].flags & (GTF_reading | GTF_writing), 0, "persistent grants are let go of");
    put("state", XenbusStateInitialising);
    connect(0, false);
    ring.req_prod_pvt += 2 * ring.nr_ents;
    push();
    notify(port);
    ok(backend_reaches(XenbusStateClosing, XenbusStateClosed), "more requests than there are slots: we are served no more");
}
