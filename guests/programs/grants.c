/* The grant table of one domain with itself: set up, query, copy, map, unmap, and what each refuses. */
#include <guest.h>

const char program_name[] = "grants";

static char frame_page[PAGE_SIZE] PAGE_ALIGNED, source[PAGE_SIZE] PAGE_ALIGNED, target[PAGE_SIZE] PAGE_ALIGNED;
static char window[PAGE_SIZE] PAGE_ALIGNED;
static volatile grant_entry_v1_t *grants;
static domid_t self;

static domid_t own_domid(void)
{
    struct evtchn_alloc_unbound op = {.dom = DOMID_SELF, .remote_dom = DOMID_SELF};
    HYPERVISOR_event_channel_op(EVTCHNOP_alloc_unbound, &op);
    struct evtchn_status s = {.dom = DOMID_SELF, .port = op.port};
    HYPERVISOR_event_channel_op(EVTCHNOP_status, &s);
    struct evtchn_close close = {.port = op.port};
    HYPERVISOR_event_channel_op(EVTCHNOP_close, &close);
    return s.u.unbound.dom;
}

static void grant(grant_ref_t ref, const void *page, uint16_t flags)
{
    grants[ref].domid = self;
    grants[ref].frame = (uint32_t)virt_to_mfn(page);
    barrier();
    grants[ref].flags = GTF_permit_access | flags;
}

/* The frames of version 2's status words cannot go while one is mapped. */
static void status_frames(void)
{
    struct gnttab_set_version set = {.version = 2};
    same(HYPERVISOR_grant_table_op(GNTTABOP_set_version, &set, 1), 0, "set_version 2");
    uint64_t frame = 0;
    struct gnttab_get_status_frames get = {.dom = DOMID_SELF, .nr_frames = 1};
    set_xen_guest_handle(get.frame_list, &frame);
    same(HYPERVISOR_grant_table_op(GNTTABOP_get_status_frames, &get, 1), 0, "get_status_frames");
    same(get.status, GNTST_okay, "is okay");
    uint64_t before = read_pte(target);
    same(set_pte(target, frame << PAGE_SHIFT | PTE_RO), 0, "a status frame can be mapped");
    set.version = 1;
    same(HYPERVISOR_grant_table_op(GNTTABOP_set_version, &set, 1), -XEN_EBUSY, "set_version 1 while it is: EBUSY");
    same(set_pte(target, (before & PTE_FRAME) | PTE_RW), 0, "map something else there");
    same(HYPERVISOR_grant_table_op(GNTTABOP_set_version, &set, 1), 0, "now set_version 1");
    same(set_pte(target, frame << PAGE_SHIFT | PTE_RO), -XEN_EBUSY, "the status frame is gone: EBUSY");
}

static void set_up(void)
{
    struct gnttab_query_size query = {.dom = DOMID_SELF};
    same(HYPERVISOR_grant_table_op(GNTTABOP_query_size, &query, 1), 0, "query_size");
    same(query.status, GNTST_okay, "is okay");
    ok(query.nr_frames >= 1 && query.max_nr_frames >= query.nr_frames, "%u of at most %u frames", query.nr_frames, query.max_nr_frames);
    xen_pfn_t frames[1];
    struct gnttab_setup_table setup = {.dom = DOMID_SELF, .nr_frames = 1};
    set_xen_guest_handle(setup.frame_list, frames);
    same(HYPERVISOR_grant_table_op(GNTTABOP_setup_table, &setup, 1), 0, "setup_table");
    same(setup.status, GNTST_okay, "is okay");
    same(set_pte(frame_page, (uint64_t)frames[0] << PAGE_SHIFT | PTE_RW), 0, "its frame can be mapped");
    grants = (volatile grant_entry_v1_t *)frame_page;
    bool empty = true;
    for (unsigned ref = GNTTAB_NR_RESERVED_ENTRIES; ref < PAGE_SIZE / sizeof(*grants); ref++)
        empty &= grants[ref].flags == 0;
    ok(empty, "all entries but the reserved ones are empty");
    setup.nr_frames = query.max_nr_frames + 1;
    same(HYPERVISOR_grant_table_op(GNTTABOP_setup_table, &setup, 1), 0, "setup_table with too many frames");
    same(setup.status, GNTST_general_error, "is a general error");
    query.dom = 0x7123;
    same(HYPERVISOR_grant_table_op(GNTTABOP_query_size, &query, 1), 0, "query_size of a domain that is not there");
    same(query.status, GNTST_bad_domain, "is a bad domain");
    struct gnttab_get_version version = {.dom = DOMID_SELF};
    same(HYPERVISOR_grant_table_op(GNTTABOP_get_version, &version, 1), 0, "get_version");
    same(version.version, 1, "is 1");
    struct gnttab_set_version set = {.version = 3};
    same(HYPERVISOR_grant_table_op(GNTTABOP_set_version, &set, 1), -XEN_EINVAL, "set_version 3: EINVAL");
    status_frames();
    set.version = 1;
    same(HYPERVISOR_grant_table_op(GNTTABOP_set_version, &set, 1), 0, "set_version 1");
    same(HYPERVISOR_grant_table_op(77, &set, 1), -XEN_ENOSYS, "an unknown command: ENOSYS");
    self = own_domid();
    note("this is domain %u", self);
}

static int copy_from(grant_ref_t ref, unsigned from, unsigned to, unsigned size)
{
    struct gnttab_copy op = {
        .source.u.ref = ref, .source.domid = self, .source.offset = from,
        .dest.u.gmfn = virt_to_mfn(target), .dest.domid = DOMID_SELF, .dest.offset = to,
        .len = size, .flags = GNTCOPY_source_gref};
    same(HYPERVISOR_grant_table_op(GNTTABOP_copy, &op, 1), 0, "copy: the hypercall");
    return op.status;
}

static int copy_to(grant_ref_t ref, unsigned size)
{
    struct gnttab_copy op = {
        .source.u.gmfn = virt_to_mfn(target), .source.domid = DOMID_SELF,
        .dest.u.ref = ref, .dest.domid = self,
        .len = size, .flags = GNTCOPY_dest_gref};
    HYPERVISOR_grant_table_op(GNTTABOP_copy, &op, 1);
    return op.status;
}

static void copies(void)
{
    for (unsigned i = 0; i < PAGE_SIZE; i++)
        source[i] = (char)(i * 7);
    memset(target, 0, PAGE_SIZE);
    grant(8, source, GTF_readonly);
    same(copy_from(8, 100, 200, 300), GNTST_okay, "copy 300 bytes from a read-only grant");
    ok(!memcmp(source + 100, target + 200, 300) && target[199] == 0 && target[500] == 0, "exactly those arrive");
    same(grants[8].flags, GTF_permit_access | GTF_readonly, "the entry is not in use behind it");
    same(copy_to(8, 8), GNTST_general_error, "copy to a read-only grant: general error");
    same(copy_from(9, 0, 0, 8), GNTST_general_error, "copy from an entry that grants nothing: general error");
    same(copy_from(100000, 0, 0, 8), GNTST_bad_gntref, "copy from a reference out of range: bad reference");
    same(copy_from(8, 4000, 0, 200), GNTST_bad_copy_arg, "copy over the end of a page: bad argument");
    same(copy_from(8, 0, 4000, 200), GNTST_bad_copy_arg, "the same at the target");
    grant(10, source, 0);
    memset(target, 0x5a, PAGE_SIZE);
    same(copy_to(10, PAGE_SIZE), GNTST_okay, "copy a page to a writable grant");
    ok(source[0] == 0x5a && source[4095] == 0x5a, "it arrives");
    grants[10].domid = self + 1;
    same(copy_to(10, 8), GNTST_general_error, "copy to a grant for another domain: general error");
    grants[10].flags = 0;
    struct gnttab_copy plain = {
        .source.u.gmfn = virt_to_mfn(target), .source.domid = DOMID_SELF,
        .dest.u.gmfn = virt_to_mfn(source), .dest.domid = DOMID_SELF, .len = 16};
    same(HYPERVISOR_grant_table_op(GNTTABOP_copy, &plain, 1), 0, "copy between frames of its own");
    same(plain.status, GNTST_okay, "is okay");
}

static long map(grant_ref_t ref, unsigned flags, struct gnttab_map_grant_ref *op)
{
    *op = (struct gnttab_map_grant_ref){.host_addr = (unsigned long)window, .flags = flags, .ref = ref, .dom = self};
    return HYPERVISOR_grant_table_op(GNTTABOP_map_grant_ref, op, 1);
}

static int unmap(grant_handle_t handle)
{
    struct gnttab_unmap_grant_ref op = {.host_addr = (unsigned long)window, .handle = handle};
    HYPERVISOR_grant_table_op(GNTTABOP_unmap_grant_ref, &op, 1);
    return op.status;
}

static void write_word(unsigned long a) { *(volatile uint64_t *)a = 0x1234; }

static void maps(void)
{
    struct gnttab_map_grant_ref op;
    set_pte(window, 0);
    grant(11, source, 0);
    same(map(11, GNTMAP_host_map, &op), 0, "map_grant_ref");
    same(op.status, GNTST_okay, "is okay");
    *(volatile uint64_t *)window = 0x600d;
    same(*(volatile uint64_t *)source, 0x600d, "the mapping shows the granted page");
    same(grants[11].flags & (GTF_reading | GTF_writing), GTF_reading | GTF_writing, "the entry is in use, read and written");
    same(unmap(op.handle), GNTST_okay, "unmap it");
    same(grants[11].flags, GTF_permit_access, "the entry is not in use any more");
    same(attempt(write_word, (unsigned long)window), 14, "and the mapping is gone");
    same(unmap(op.handle), GNTST_bad_handle, "unmap it again: bad handle");
    same(unmap(0x7fffffff), GNTST_bad_handle, "unmap a handle that never was: bad handle");
    same(map(11, GNTMAP_host_map | GNTMAP_readonly, &op), 0, "map it read-only");
    same(op.status, GNTST_okay, "is okay");
    same(grants[11].flags & (GTF_reading | GTF_writing), GTF_reading, "the entry is being read");
    same(attempt(write_word, (unsigned long)window), 14, "a write is #PF");
    same(unmap(op.handle), GNTST_okay, "unmap it");
    grant(12, source, GTF_readonly);
    same(map(12, GNTMAP_host_map, &op), 0, "map a read-only grant for writing");
    same(op.status, GNTST_general_error, "is a general error");
    map(13, GNTMAP_host_map, &op);
    same(op.status, GNTST_general_error, "map an entry that grants nothing: general error");
    map(100000, GNTMAP_host_map, &op);
    same(op.status, GNTST_bad_gntref, "map a reference out of range: bad reference");
    op = (struct gnttab_map_grant_ref){.host_addr = (unsigned long)window, .flags = GNTMAP_host_map, .ref = 11, .dom = 0x7123};
    HYPERVISOR_grant_table_op(GNTTABOP_map_grant_ref, &op, 1);
    same(op.status, GNTST_bad_domain, "map from a domain that is not there: bad domain");
    map(11, 0, &op);
    same(op.status, GNTST_bad_gntref, "map to nowhere: bad reference");
}

/* What keeps the count of writable references right. A mapping for CPU and device is ended in two halves; a page table entry that
 * was changed under a grant keeps it from being unmapped; the reference counts show in that a page cannot become a page table. */
static long pin(const void *page)
{
    struct mmuext_op op = {.cmd = MMUEXT_PIN_L1_TABLE, .arg1.mfn = virt_to_mfn(page)};
    return HYPERVISOR_mmuext_op(&op, 1, NULL, DOMID_SELF);
}

static char second[PAGE_SIZE] PAGE_ALIGNED, other_window[PAGE_SIZE] PAGE_ALIGNED, plain[PAGE_SIZE] PAGE_ALIGNED;

static void references(void)
{
    struct gnttab_map_grant_ref op;
    uint64_t entry = read_pte(window);
    grant(8, second, 0);
    map(8, GNTMAP_host_map | GNTMAP_device_map, &op);
    same(op.status, GNTST_okay, "map for the CPU and a device");
    struct gnttab_unmap_grant_ref half = {.host_addr = (uint64_t)window, .handle = op.handle};
    HYPERVISOR_grant_table_op(GNTTABOP_unmap_grant_ref, &half, 1);
    same(half.status, GNTST_okay, "unmap from the CPU alone");
    ok(grants[8].flags & GTF_writing, "the entry is still in use");
    half.host_addr = 0;
    half.dev_bus_addr = op.dev_bus_addr;
    HYPERVISOR_grant_table_op(GNTTABOP_unmap_grant_ref, &half, 1);
    same(half.status, GNTST_okay, "unmap from the device alone");
    ok(!(grants[8].flags & GTF_writing), "it is free now");
    same(pin(second), -XEN_EINVAL, "a page that is mapped writable cannot become a page table");
    set_pte(window, entry);

    set_pte(second, ((uint64_t)virt_to_mfn(second) << PAGE_SHIFT) | PTE_RO);
    grant(9, plain, 0);
    map(8, GNTMAP_host_map, &op);
    grant_handle_t writable = op.handle;
    uint64_t other_entry = read_pte(other_window);
    struct gnttab_map_grant_ref readable = {.host_addr = (uint64_t)other_window, .flags = GNTMAP_host_map | GNTMAP_readonly, .ref = 9, .dom = self};
    HYPERVISOR_grant_table_op(GNTTABOP_map_grant_ref, &readable, 1);
    ok(op.status == GNTST_okay && readable.status == GNTST_okay, "map one page writable, another read-only");
    struct gnttab_unmap_and_replace replace = {.host_addr = (uint64_t)other_window, .new_addr = (uint64_t)window, .handle = readable.handle};
    same(HYPERVISOR_grant_table_op(GNTTABOP_unmap_and_replace, &replace, 1), 0, "unmap_and_replace, taking the other's entry");
    same(replace.status, GNTST_okay, "is okay");
    set_pte(window, ((uint64_t)virt_to_mfn(second) << PAGE_SHIFT) | PTE_RO);
    same(unmap(writable), GNTST_general_error, "the writable mapping is not where it was: unmap refuses");
    same(pin(second), -XEN_EINVAL, "and its reference is still counted");
    set_pte(other_window, other_entry);

    struct gnttab_map_grant_ref wrong = {.host_addr = (uint64_t)plain, .flags = GNTMAP_host_map, .ref = 8, .dom = 0};
    HYPERVISOR_grant_table_op(GNTTABOP_map_grant_ref, &wrong, 1);
    if (is_initial_domain())
        skip("a grant of domain 0", "this is it");
    else
        same(wrong.status, GNTST_general_error, "an entry of domain 0 that it filled for nobody");
    wrong = (struct gnttab_map_grant_ref){.host_addr = pte_machine_address(plain) - 2, .flags = GNTMAP_host_map | GNTMAP_contains_pte, .ref = 9, .dom = self};
    HYPERVISOR_grant_table_op(GNTTABOP_map_grant_ref, &wrong, 1);
    ok(wrong.status < 0, "a page table entry's address that is not aligned");
    struct gnttab_copy copy = {.source.u.gmfn = virt_to_mfn(plain), .source.domid = DOMID_SELF, .dest.u.gmfn = virt_to_mfn((void *)start_info->pt_base), .dest.domid = DOMID_SELF, .len = 8};
    HYPERVISOR_grant_table_op(GNTTABOP_copy, &copy, 1);
    same(copy.status, GNTST_general_error, "a copy over a page table");
    struct gnttab_query_size query = {.dom = DOMID_SELF};
    same(HYPERVISOR_grant_table_op(GNTTABOP_query_size, &query, 2), -XEN_EINVAL, "query_size of two: EINVAL");
}

void program(void)
{
    set_up();
    copies();
    maps();
    references();
}
