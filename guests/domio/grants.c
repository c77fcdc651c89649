/* Frames of frontends: for the device only (GNTMAP_device_map: into our I/O page tables, nowhere else), and ring pages for the processor.
 *
 * In persistent mode a frame stays mapped, writable, until the frontend lets go of the disk; what does not fit, or may only be read, is
 * mapped for the one request.
 */
#include "domio.h"

#define BATCH 256

static struct gnttab_map_grant_ref maps[BATCH];
static struct segment *targets[BATCH];
static struct gnttab_unmap_grant_ref unmaps[BATCH];
static unsigned queued, unqueued;

static unsigned slot_of(grant_ref_t ref) { return ref * 2654435761u >> 8 & (KEPT_SLOTS - 1); }

static struct kept *find_kept(struct disk *disk, grant_ref_t ref)
{
    unsigned at = slot_of(ref);
    while (disk->kept[at].used && disk->kept[at].ref != ref)
        at = (at + 1) & (KEPT_SLOTS - 1);
    return &disk->kept[at];
}

static void flush_unmaps(void)
{
    if (unqueued)
        HYPERVISOR_grant_table_op(GNTTABOP_unmap_grant_ref, unmaps, unqueued);
    unqueued = 0;
}

static void unmap_later(grant_handle_t handle, uint64_t address)
{
    unmaps[unqueued] = (struct gnttab_unmap_grant_ref){.dev_bus_addr = address, .handle = handle};
    if (++unqueued == BATCH)
        flush_unmaps();
}

static void keep(struct disk *disk, struct segment *segment)
{
    struct kept *place = find_kept(disk, segment->ref);
    if (place->used) { /* the same reference twice in one batch: both mappings are of one frame, one is enough */
        unmap_later(segment->handle, segment->address);
        segment->handle = place->handle;
        segment->address = place->address;
        segment->kept = true;
        return;
    }
    if (disk->kept_count >= MAX_KEPT)
        return;
    *place = (struct kept){segment->ref, segment->handle, segment->address, true};
    disk->kept_count++;
    segment->kept = true;
}

static void flush_maps(struct disk *disk, bool keeping)
{
    if (!queued)
        return;
    long rc = HYPERVISOR_grant_table_op(GNTTABOP_map_grant_ref, maps, queued);
    for (unsigned i = 0; i < queued; i++) {
        if (rc || maps[i].status != GNTST_okay) {
            targets[i]->not_now = !rc && maps[i].status == GNTST_eagain;
            continue;
        }
        targets[i]->handle = maps[i].handle;
        targets[i]->address = maps[i].dev_bus_addr;
        if (keeping)
            keep(disk, targets[i]);
    }
    queued = 0;
}

static void map_later(struct disk *disk, struct segment *segment, bool writable, bool keeping)
{
    maps[queued] = (struct gnttab_map_grant_ref){
        .flags = GNTMAP_device_map | (writable ? 0 : GNTMAP_readonly), .ref = segment->ref, .dom = disk->frontend_id};
    targets[queued] = segment;
    if (++queued == BATCH)
        flush_maps(disk, keeping);
}

void map_requests(struct disk *disk, struct request **requests, unsigned count, bool *fine)
{
    bool persistent = disk->link.persistent;
    for (unsigned r = 0; r < count; r++) {
        struct request *request = requests[r];
        for (unsigned i = 0; i < request->count; i++) {
            struct segment *segment = &request->segments[i];
            if (segment->address)
                continue;
            if (persistent) {
                struct kept *found = find_kept(disk, segment->ref);
                if (found->used) {
                    segment->handle = found->handle;
                    segment->address = found->address;
                    segment->kept = true;
                    continue;
                }
            }
            map_later(disk, segment, persistent || request->kind == KIND_READ, persistent);
        }
    }
    flush_maps(disk, persistent);
    for (unsigned r = 0; persistent && r < count; r++) /* granted for reading alone */
        for (unsigned i = 0; requests[r]->kind == KIND_WRITE && i < requests[r]->count; i++)
            if (!requests[r]->segments[i].address)
                map_later(disk, &requests[r]->segments[i], false, false);
    flush_maps(disk, false);
    for (unsigned r = 0; r < count; r++) {
        bool never = false;
        fine[r] = true;
        for (unsigned i = 0; i < requests[r]->count; i++) {
            struct segment *segment = &requests[r]->segments[i];
            fine[r] &= segment->address != 0;
            never |= !segment->address && !segment->not_now;
        }
        requests[r]->not_now = !fine[r] && !never;
        if (!fine[r])
            unmap_requests(&requests[r], 1);
    }
}

void unmap_requests(struct request **requests, unsigned count)
{
    for (unsigned r = 0; r < count; r++)
        for (unsigned i = 0; i < requests[r]->count; i++) {
            struct segment *segment = &requests[r]->segments[i];
            if (segment->address && !segment->kept)
                unmap_later(segment->handle, segment->address);
            segment->address = 0;
            segment->kept = false;
        }
    flush_unmaps();
}

void unmap_kept(struct disk *disk)
{
    for (unsigned i = 0; i < KEPT_SLOTS; i++)
        if (disk->kept[i].used) {
            unmap_later(disk->kept[i].handle, disk->kept[i].address);
            disk->kept[i].used = false;
        }
    disk->kept_count = 0;
    flush_unmaps();
}

bool map_ring(domid_t domid, const uint32_t *refs, unsigned pages, char *window, grant_handle_t *handles)
{
    for (unsigned i = 0; i < pages; i++) {
        struct gnttab_map_grant_ref op = {
            .host_addr = (unsigned long)window + i * PAGE_SIZE, .flags = GNTMAP_host_map, .ref = refs[i], .dom = domid};
        long rc = HYPERVISOR_grant_table_op(GNTTABOP_map_grant_ref, &op, 1);
        if (rc || op.status != GNTST_okay) {
            unmap_ring(i, window, handles);
            return false;
        }
        handles[i] = op.handle;
    }
    return true;
}

void unmap_ring(unsigned pages, char *window, grant_handle_t *handles)
{
    for (unsigned i = 0; i < pages; i++) {
        struct gnttab_unmap_grant_ref op = {.host_addr = (unsigned long)window + i * PAGE_SIZE, .handle = handles[i]};
        HYPERVISOR_grant_table_op(GNTTABOP_unmap_grant_ref, &op, 1);
    }
}
