/* Rings of one disk, both ways. A request's life: copied from the ring into its record, checked (taken) -> frames mapped, commands made ->
 * completed -> frames let go of -> answered. Each step works on batches.
 *
 * Order, each queue by itself (as blkif.h leaves it): a flush starts when all writes taken before it are completed; a barrier starts when
 * everything before it is, and nothing behind it starts before it is. Everything else runs in any order.
 */
#include "domio.h"

#define HEADER 64             /* bytes of a ring before its slots */
#define ROUNDS 4
#define LOOK_AGAIN NS_MS
#define FUA (1u << 30)
#define DEALLOCATE 4
#define MAX_RANGES 256

struct shared {
    volatile uint32_t req_prod, req_event, rsp_prod, rsp_event;
};

struct response {
    uint64_t id;
    uint8_t op, unused;
    int16_t status;
};

struct range {
    uint32_t attributes, blocks;
    uint64_t block;
};

static const struct abi abis[] = {
    {.slot = 112, .id = 8, .sector = 16, .segments = 24, .grefs = 28}, /* x86_64-abi */
    {.slot = 108, .id = 4, .sector = 12, .segments = 20, .grefs = 24}, /* x86_32-abi */
};

static struct queue *by_port[MAX_PORTS];

static struct shared *shared(struct queue *queue) { return (struct shared *)queue->ring; }
static const struct abi *abi_of(const struct disk *disk) { return &abis[disk->link.abi]; }

static char *slot_of(struct disk *disk, struct queue *queue, uint32_t index)
{
    return queue->ring + HEADER + (index & (queue->size - 1)) * abi_of(disk)->slot;
}

static unsigned number_of(struct disk *disk, struct request *request) { return request - disk->requests; }
static struct record *record_of(struct disk *disk, struct request *request) { return &disk->ledger->records[number_of(disk, request)]; }

static void ring_event(evtchn_port_t port)
{
    if (by_port[port])
        by_port[port]->kicked = true;
    work = true;
}

/* --- from the ring --- */

static void done_already(struct disk *disk, struct request *request)
{
    request->phase = PHASE_DONE;
    fifo_put(&disk->done, request);
}

static void admit(struct disk *disk, struct request *request)
{
    parse(disk, abi_of(disk), record_of(disk, request), request);
    if (request->status == 1) {
        request->phase = PHASE_WAITING;
        fifo_put(&disk->queues[request->queue].waiting, request);
    } else
        done_already(disk, request);
}

static void take(struct disk *disk, unsigned q, uint32_t count)
{
    static struct gnttab_copy copies[MAX_REQUESTS];
    static struct record *copied[MAX_REQUESTS];
    struct queue *queue = &disk->queues[q];
    struct request *taken[MAX_REQUESTS];
    unsigned number = 0, wanted = 0;
    for (unsigned i = 0; i < MAX_REQUESTS && number < count; i++) {
        struct request *request = &disk->requests[i];
        if (request->phase != PHASE_FREE)
            continue;
        struct record *record = record_of(disk, request);
        grant_ref_t ref;
        request->queue = record->queue = q;
        request->index = record->index = queue->req_cons + number;
        record->segment_count = 0;
        memcpy(record->raw, slot_of(disk, queue, request->index), abi_of(disk)->slot);
        unsigned segments = indirect_of(abi_of(disk), record->raw, &ref);
        if (segments) {
            copied[wanted] = record;
            copies[wanted++] = (struct gnttab_copy){
                .source.u.ref = ref, .source.domid = disk->frontend_id,
                .dest.u.gmfn = ledger_frame(record), .dest.domid = DOMID_SELF,
                .dest.offset = (unsigned long)record->segments & (PAGE_SIZE - 1),
                .len = segments * sizeof(struct blkif_request_segment), .flags = GNTCOPY_source_gref};
        }
        request->phase = PHASE_WAITING;
        taken[number++] = request;
    }
    if (wanted && !HYPERVISOR_grant_table_op(GNTTABOP_copy, copies, wanted))
        for (unsigned i = 0; i < wanted; i++)
            if (copies[i].status == GNTST_okay)
                copied[i]->segment_count = copies[i].len / sizeof(struct blkif_request_segment);
    barrier();
    for (unsigned i = 0; i < number; i++)
        record_of(disk, taken[i])->state = LEDGER_TAKEN;
    queue->req_cons += number;
    barrier();
    disk->ledger->req_cons[q] = queue->req_cons;
    disk->in_use += number;
    for (unsigned i = 0; i < number; i++)
        admit(disk, taken[i]);
}

/* True if something was taken. */
static bool poll(struct disk *disk, unsigned q)
{
    struct queue *queue = &disk->queues[q];
    bool any = false;
    for (unsigned round = 0; round < ROUNDS; round++) {
        uint32_t produced = shared(queue)->req_prod, count = produced - queue->req_cons;
        if (produced - queue->rsp_prod > queue->size) {
            disk->error = "more requests are published than the ring has slots";
            return any;
        }
        if (!count) {
            shared(queue)->req_event = queue->req_cons + 1;
            full_barrier();
            if (shared(queue)->req_prod == queue->req_cons)
                return any;
            continue;
        }
        if (disk->in_use == MAX_REQUESTS)
            return any; /* an answer makes room, and has the ring looked at */
        barrier(); /* slots are read after the index */
        take(disk, q, count);
        any = true;
    }
    queue->kicked = work = true; /* when others had their turn */
    return any;
}

/* --- to the controller --- */

static void finished(struct disk *disk, struct request *request)
{
    struct queue *queue = &disk->queues[request->queue];
    request->status = request->failed ? BLKIF_RSP_ERROR : BLKIF_RSP_OKAY;
    queue->active--;
    queue->active_writes -= request->kind == KIND_WRITE;
    if (request->barrier)
        queue->barrier = false;
    done_already(disk, request);
}

static void start(struct disk *disk, struct queue *queue)
{
    struct request *ready[MAX_REQUESTS];
    bool fine[MAX_REQUESTS];
    unsigned count = 0;
    while (queue->waiting.first && !queue->barrier) {
        struct request *request = queue->waiting.first;
        if ((request->barrier && queue->active) || (request->flush && queue->active_writes))
            break;
        fifo_take(&queue->waiting);
        ready[count++] = request;
        queue->active++;
        queue->active_writes += request->kind == KIND_WRITE;
        queue->barrier = request->barrier;
    }
    if (!count)
        return;
    map_requests(disk, ready, count, fine);
    for (unsigned i = 0; i < count; i++) {
        if (ready[i]->not_now)
            continue;
        if (!fine[i]) {
            ready[i]->failed = true;
            finished(disk, ready[i]);
            continue;
        }
        ready[i]->phase = ready[i]->flush ? PHASE_FLUSH : PHASE_DATA;
        ready[i]->cursor = ready[i]->prps = 0;
        fifo_put(&disk->issue, ready[i]);
    }
    for (unsigned i = count; i-- > 0;) { /* the hypervisor does not wait for this frontend now: again with the next tick */
        struct request *request = ready[i];
        if (!request->not_now)
            continue;
        request->not_now = false;
        queue->active--;
        queue->active_writes -= request->kind == KIND_WRITE;
        if (request->barrier)
            queue->barrier = false;
        fifo_put_first(&queue->waiting, request);
    }
}

static bool issue_discard(struct disk *disk, struct request *request, struct range *ranges)
{
    uint64_t block = request->sector, left = request->sectors;
    unsigned count = 0;
    for (; left && count < MAX_RANGES; count++) {
        uint32_t part = left < 0xFFFFFFFF ? left : 0xFFFFFFFF;
        ranges[count] = (struct range){0, part, block};
        block += part;
        left -= part;
    }
    if (left) { /* a disk of some terabytes, at once */
        request->failed = true;
        return true;
    }
    return nvme_submit(disk, request, NVME_DATASET, bus_address(ranges), 0, 0, 0, count - 1, DEALLOCATE);
}

/* A command of as many segments as one can have: all but its first begin a page, all but its last end one. */
static bool issue_transfer(struct disk *disk, struct request *request, uint64_t *list)
{
    unsigned i = request->cursor, entries = 0;
    uint32_t bytes = 0;
    uint64_t done = 0, first = request->segments[i].address + request->segments[i].offset;
    for (unsigned before = 0; before < i; before++)
        done += request->segments[before].length / SECTOR;
    do {
        struct segment *segment = &request->segments[i];
        if (bytes)
            list[request->prps + entries++] = segment->address;
        bytes += segment->length;
        i++;
        if (segment->offset + segment->length != PAGE_SIZE)
            break;
    } while (i < request->count && !request->segments[i].offset && bytes + request->segments[i].length <= disk->nvme.max_bytes);
    uint64_t second = entries > 1 ? bus_address(&list[request->prps]) : entries ? list[request->prps] : 0;
    uint32_t dword12 = bytes / SECTOR - 1;
    if (request->kind == KIND_WRITE && request->op != BLKIF_OP_WRITE)
        dword12 |= FUA; /* a write with a flush or barrier */
    unsigned opcode = request->kind == KIND_READ ? NVME_READ : NVME_WRITE;
    if (!nvme_submit(disk, request, opcode, first, second, request->sector + done, dword12, 0, 0))
        return false;
    request->cursor = i;
    request->prps += entries;
    return true;
}

/* False: there is no room for its next command. */
static bool issue_one(struct disk *disk, struct request *request)
{
    char *list = pages_of[disk->place].prps[number_of(disk, request)];
    request->stamp = disk->writes_done;
    if (request->phase == PHASE_FLUSH)
        return nvme_submit(disk, request, NVME_FLUSH, 0, 0, 0, 0, 0, 0);
    if (request->kind == KIND_DISCARD) {
        if (!issue_discard(disk, request, (struct range *)list))
            return false;
    } else
        while (!request->failed && request->cursor < request->count)
            if (!issue_transfer(disk, request, (uint64_t *)list))
                return false;
    request->cursor = request->count;
    if (!request->outstanding)
        finished(disk, request);
    return true;
}

static void issue(struct disk *disk)
{
    while (disk->issue.first) {
        struct request *request = fifo_take(&disk->issue); /* first: what is finished goes into another list */
        if (!issue_one(disk, request)) {
            fifo_put_first(&disk->issue, request);
            return;
        }
    }
}

/* --- from the controller --- */

/* What a completion says of writes that were called completed before: after a power loss the next flush fails, and the next write, as
 * Linux takes a failed flush without data for "not supported" and goes on; one with data says it for both. */
static void account(struct disk *disk, struct request *request)
{
    struct ledger *ledger = disk->ledger;
    if (request->failed || request->kind == KIND_READ)
        return;
    if (request->phase == PHASE_FLUSH) {
        if (ledger->lost & OWES_FLUSH & ~disk->told) {
            disk->told |= OWES_FLUSH | (request->kind != KIND_NONE ? OWES_WRITE : 0);
            request->failed = true;
        } else if (request->stamp == disk->writes_done)
            ledger->dirty = 0;
    } else if (ledger->lost & OWES_WRITE & ~disk->told) {
        disk->told |= OWES_WRITE;
        request->failed = true;
    } else {
        disk->writes_done++;
        ledger->dirty = 1;
    }
}

static void command_done(struct disk *disk, struct request *request, bool fine)
{
    request->outstanding--;
    request->failed |= !fine;
    if (request->outstanding)
        return;
    if (request->phase == PHASE_FLUSH || request->cursor == request->count)
        account(disk, request);
    if (request->phase == PHASE_FLUSH && request->kind != KIND_NONE && !request->failed) {
        request->flush = false;
        request->phase = PHASE_DATA;
        fifo_put(&disk->issue, request);
    } else if (request->phase == PHASE_FLUSH || request->cursor == request->count)
        finished(disk, request);
}

void rings_reissue(struct disk *disk)
{
    fifo_init(&disk->issue);
    for (unsigned q = 0; q < disk->link.queues; q++) {
        struct queue *queue = &disk->queues[q];
        struct fifo later = queue->waiting;
        if (!later.first)
            later.last = &later.first;
        fifo_init(&queue->waiting);
        queue->active = queue->active_writes = 0;
        queue->barrier = false;
        for (;;) { /* in the order in which they were taken */
            struct request *oldest = NULL;
            for (unsigned i = 0; i < MAX_REQUESTS; i++) {
                struct request *request = &disk->requests[i];
                if (request->queue != q || (request->phase != PHASE_FLUSH && request->phase != PHASE_DATA))
                    continue;
                if (!oldest || queue->req_cons - request->index > queue->req_cons - oldest->index)
                    oldest = request;
            }
            if (!oldest)
                break;
            oldest->phase = PHASE_WAITING;
            oldest->flush = oldest->op == BLKIF_OP_FLUSH_DISKCACHE || oldest->op == BLKIF_OP_WRITE_BARRIER;
            oldest->failed = false;
            oldest->outstanding = oldest->cursor = oldest->prps = 0;
            fifo_put(&queue->waiting, oldest);
        }
        for (struct request *request = later.first, *next; request; request = next) {
            next = request->next;
            fifo_put(&queue->waiting, request);
        }
    }
    work = true;
}

/* --- to the ring --- */

static void publish(struct disk *disk, unsigned q, struct request **answers, unsigned count)
{
    struct queue *queue = &disk->queues[q];
    uint32_t old = queue->rsp_prod, index = old;
    if (!count)
        return;
    for (unsigned i = 0; i < count; i++) {
        struct record *record = record_of(disk, answers[i]);
        record->answer = old + i;
        barrier();
        record->state = LEDGER_ANSWERED;
    }
    for (unsigned i = 0; i < count; i++) {
        struct response response = {.id = answers[i]->id, .op = answers[i]->op, .status = answers[i]->status};
        memcpy(slot_of(disk, queue, index++), &response, 12);
    }
    queue->rsp_prod = index;
    barrier();
    shared(queue)->rsp_prod = index;
    full_barrier();
    bool wanted = index - shared(queue)->rsp_event < index - old;
    disk->ledger->rsp_prod[q] = index;
    for (unsigned i = 0; i < count; i++) {
        record_of(disk, answers[i])->state = LEDGER_FREE;
        answers[i]->phase = PHASE_FREE;
    }
    disk->in_use -= count;
    queue->kicked = true; /* there is room again */
    if (wanted)
        notify(queue->port);
}

static void answer(struct disk *disk)
{
    struct request *done[MAX_REQUESTS], *mine[MAX_REQUESTS];
    unsigned count = 0;
    while (disk->done.first) {
        struct request *request = fifo_take(&disk->done);
        struct record *record = record_of(disk, request);
        record->status = request->status;
        barrier();
        record->state = LEDGER_COMPLETED;
        done[count++] = request;
    }
    if (disk->told) { /* only now: who died before this line has told nobody */
        if (disk->told & OWES_FLUSH)
            disk->ledger->dirty = 0;
        disk->ledger->lost &= ~disk->told;
        disk->told = 0;
    }
    unmap_requests(done, count);
    for (unsigned q = 0; q < disk->link.queues; q++) {
        unsigned number = 0;
        for (unsigned i = 0; i < count; i++)
            if (done[i]->queue == q)
                mine[number++] = done[i];
        publish(disk, q, mine, number);
    }
}

void rings_work(struct disk *disk, uint64_t now)
{
    nvme_completions(disk, command_done);
    for (unsigned q = 0; q < disk->link.queues; q++) {
        struct queue *queue = &disk->queues[q];
        bool due = queue->look_at && now >= queue->look_at;
        if ((queue->kicked || due) && !disk->draining && !disk->error) {
            queue->kicked = false;
            /* A frontend may have gone by an old event index: what it published is seen a millisecond later. */
            queue->look_at = poll(disk, q) ? now + LOOK_AGAIN : 0;
        }
        if (disk->nvme.state == NVME_READY)
            start(disk, queue);
    }
    issue(disk);
    nvme_ring_doorbell(disk);
    answer(disk);
    for (unsigned q = 0; q < disk->link.queues; q++)
        if (disk->queues[q].kicked)
            work = true;
}

/* --- up and down --- */

static const char *recover(struct disk *disk)
{
    struct ledger *ledger = disk->ledger;
    for (unsigned q = 0; q < disk->link.queues; q++) {
        struct queue *queue = &disk->queues[q];
        queue->req_cons = ledger->req_cons[q];
        queue->rsp_prod = shared(queue)->rsp_prod;
        if (queue->rsp_prod - ledger->rsp_prod[q] > MAX_REQUESTS || queue->req_cons - queue->rsp_prod > queue->size)
            return "the ring's indexes are not those that were left";
    }
    for (unsigned i = 0; i < MAX_REQUESTS; i++) {
        struct record *record = &ledger->records[i];
        struct request *request = &disk->requests[i];
        uint32_t state = record->state;
        request->phase = PHASE_FREE;
        if (state == LEDGER_FREE)
            continue;
        if (state > LEDGER_ANSWERED || record->queue >= disk->link.queues || record->segment_count > MAX_SEGMENTS)
            return "a record makes no sense";
        struct queue *queue = &disk->queues[record->queue];
        bool taken = queue->req_cons - record->index - 1 < 1u << 31;
        bool seen = state == LEDGER_ANSWERED && queue->rsp_prod - record->answer - 1 < 1u << 31;
        if (!taken || seen) { /* still in the ring; or the frontend has its answer */
            record->state = LEDGER_FREE;
            continue;
        }
        request->queue = record->queue;
        request->index = record->index;
        parse(disk, abi_of(disk), record, request);
        disk->in_use++;
        if (state != LEDGER_TAKEN)
            request->status = record->status;
        if (request->status == 1)
            request->phase = PHASE_DATA; /* made again, in order, below */
        else
            done_already(disk, request);
    }
    unsigned redone = disk->in_use;
    rings_reissue(disk);
    say("domio: %s goes on with %u requests", disk->path, redone);
    return NULL;
}

const char *rings_attach(struct disk *disk, const struct link *link, bool again)
{
    disk->link = *link;
    disk->error = NULL;
    disk->in_use = 0;
    disk->told = 0;
    fifo_init(&disk->issue);
    fifo_init(&disk->done);
    memset(disk->requests, 0, sizeof(disk->requests));
    for (unsigned q = 0; q < link->queues; q++) {
        struct queue *queue = &disk->queues[q];
        memset(queue, 0, sizeof(*queue));
        fifo_init(&queue->waiting);
        queue->ring = pages_of[disk->place].rings[q][0];
        queue->size = 1;
        while (2 * queue->size * abi_of(disk)->slot + HEADER <= link->pages * PAGE_SIZE)
            queue->size *= 2;
    }
    for (unsigned q = 0; q < link->queues; q++) {
        struct queue *queue = &disk->queues[q];
        if (!map_ring(link->frontend, link->refs[q], link->pages, queue->ring, queue->handles)) {
            disk->link.queues = q;
            rings_detach(disk);
            return "its ring cannot be mapped";
        }
        queue->port = again ? known_port(link->frontend, link->ports[q]) : 0;
        if (!queue->port) {
            struct evtchn_bind_interdomain bind = {.remote_dom = link->frontend, .remote_port = link->ports[q]};
            if (HYPERVISOR_event_channel_op(EVTCHNOP_bind_interdomain, &bind)) {
                disk->link.queues = q + 1;
                rings_detach(disk);
                return "its event channel cannot be bound";
            }
            queue->port = bind.local_port;
        }
        by_port[queue->port] = queue;
        on_port(queue->port, ring_event);
    }
    const char *wrong = NULL;
    if (again) {
        ledger_power(disk->ledger, disk->nvme.power_losses);
        wrong = recover(disk);
    } else
        ledger_begin(disk->ledger, link, disk->nvme.power_losses);
    if (wrong) {
        rings_detach(disk);
        return wrong;
    }
    disk->connected = true;
    for (unsigned q = 0; q < link->queues; q++) {
        disk->queues[q].kicked = true; /* what was published before we came counts */
        port_unmask(disk->queues[q].port);
        if (again)
            notify(disk->queues[q].port); /* an earlier life may have ended between publishing and notifying */
    }
    work = true;
    return NULL;
}

void rings_detach(struct disk *disk)
{
    unmap_kept(disk);
    for (unsigned i = 0; i < MAX_REQUESTS; i++) /* of requests that were under way: DMA to them faults from now on */
        if (disk->requests[i].phase != PHASE_FREE) {
            struct request *request = &disk->requests[i];
            unmap_requests(&request, 1);
            request->phase = PHASE_FREE;
        }
    for (unsigned q = 0; q < disk->link.queues; q++) {
        struct queue *queue = &disk->queues[q];
        if (queue->port) {
            struct evtchn_close close = {.port = queue->port};
            port_mask(queue->port);
            by_port[queue->port] = NULL;
            HYPERVISOR_event_channel_op(EVTCHNOP_close, &close);
            queue->port = 0;
        }
        unmap_ring(disk->link.pages, queue->ring, queue->handles);
    }
    disk->link.queues = 0;
    disk->in_use = 0;
    fifo_init(&disk->issue);
    fifo_init(&disk->done);
    disk->connected = false;
    ledger_end(disk->ledger);
}
