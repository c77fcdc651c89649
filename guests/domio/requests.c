/* Ring requests, checked: from the private copy of a slot to what a disk has to do. All that is wrong with one is answered to it. */
#include "domio.h"

#define MAX_DIRECT BLKIF_MAX_SEGMENTS_PER_REQUEST

void fifo_init(struct fifo *fifo)
{
    fifo->first = NULL;
    fifo->last = &fifo->first;
    fifo->length = 0;
}

void fifo_put(struct fifo *fifo, struct request *request)
{
    request->next = NULL;
    *fifo->last = request;
    fifo->last = &request->next;
    fifo->length++;
}

void fifo_put_first(struct fifo *fifo, struct request *request)
{
    request->next = fifo->first;
    if (!fifo->first)
        fifo->last = &request->next;
    fifo->first = request;
    fifo->length++;
}

struct request *fifo_take(struct fifo *fifo)
{
    struct request *request = fifo->first;
    if (!request)
        return NULL;
    fifo->first = request->next;
    if (!fifo->first)
        fifo->last = &fifo->first;
    fifo->length--;
    return request;
}

static uint64_t wide(const uint8_t *raw, unsigned at)
{
    uint64_t value;
    memcpy(&value, raw + at, 8);
    return value;
}

static uint32_t word(const uint8_t *raw, unsigned at)
{
    uint32_t value;
    memcpy(&value, raw + at, 4);
    return value;
}

static unsigned half(const uint8_t *raw, unsigned at) { return raw[at] | raw[at + 1] << 8; }

unsigned indirect_of(const struct abi *abi, const uint8_t *raw, grant_ref_t *ref)
{
    unsigned count = half(raw, 2);
    if (raw[0] != BLKIF_OP_INDIRECT || (raw[1] != BLKIF_OP_READ && raw[1] != BLKIF_OP_WRITE) || !count || count > MAX_SEGMENTS)
        return 0;
    *ref = word(raw, abi->grefs);
    return count;
}

static void transfer(const struct disk *disk, struct request *request, const struct blkif_request_segment *segments, unsigned count, uint64_t sector)
{
    uint64_t total = 0;
    bool write = request->op != BLKIF_OP_READ;
    for (unsigned i = 0; i < count; i++) {
        struct blkif_request_segment from;
        memcpy(&from, &segments[i], sizeof(from));
        if (from.first_sect > from.last_sect || from.last_sect >= PAGE_SIZE / SECTOR)
            return;
        struct segment *to = &request->segments[i];
        to->ref = from.gref;
        to->address = 0;
        to->kept = false;
        to->offset = from.first_sect * SECTOR;
        to->length = (from.last_sect - from.first_sect + 1) * SECTOR;
        total += to->length / SECTOR;
    }
    if (sector > disk->nvme.sectors || total > disk->nvme.sectors - sector || (write && disk->read_only))
        return;
    request->count = count;
    request->sector = sector;
    request->sectors = total;
    request->kind = write ? KIND_WRITE : KIND_READ;
    request->status = 1;
}

static void discard(const struct disk *disk, const struct abi *abi, const uint8_t *raw, struct request *request)
{
    uint64_t sector = wide(raw, abi->sector), sectors = wide(raw, abi->segments);
    if (!disk->discard || !disk->nvme.can_discard) {
        request->status = BLKIF_RSP_EOPNOTSUPP;
        return;
    }
    /* The secure kind is not offered: its flag is to be ignored then (blkif.h). */
    if (disk->read_only || raw[1] & ~BLKIF_DISCARD_SECURE || sector > disk->nvme.sectors || sectors > disk->nvme.sectors - sector)
        return;
    if (!sectors) {
        request->status = BLKIF_RSP_OKAY;
        return;
    }
    request->sector = sector;
    request->sectors = sectors;
    request->kind = KIND_DISCARD;
    request->status = 1;
}

void parse(const struct disk *disk, const struct abi *abi, const struct record *record, struct request *request)
{
    const uint8_t *raw = record->raw;
    unsigned count = raw[1];
    request->op = raw[0];
    request->id = wide(raw, abi->id);
    request->kind = KIND_NONE;
    request->flush = request->barrier = request->failed = false;
    request->count = request->cursor = request->outstanding = request->prps = 0;
    request->status = BLKIF_RSP_ERROR;
    switch (raw[0]) {
    case BLKIF_OP_DISCARD:
        discard(disk, abi, raw, request);
        return;
    case BLKIF_OP_INDIRECT: {
        grant_ref_t ref;
        unsigned wanted = indirect_of(abi, raw, &ref);
        request->op = raw[1];
        if (wanted && wanted == record->segment_count)
            transfer(disk, request, record->segments, wanted, wide(raw, abi->sector));
        return;
    }
    case BLKIF_OP_WRITE_BARRIER:
        request->barrier = true;
        request->flush = true;
        break;
    case BLKIF_OP_FLUSH_DISKCACHE:
        request->flush = true;
        break;
    case BLKIF_OP_READ:
    case BLKIF_OP_WRITE:
        break;
    default:
        request->status = BLKIF_RSP_EOPNOTSUPP;
        return;
    }
    if (count > MAX_DIRECT || (!count && !request->flush))
        return;
    if (!count) {
        request->status = 1;
        return;
    }
    transfer(disk, request, (const struct blkif_request_segment *)(raw + abi->segments), count, wide(raw, abi->sector));
}
