/* memory_op: reservations, giving frames back and getting others, maps. */
#include <guest.h>

const char program_name[] = "memory";

static char page[PAGE_SIZE] PAGE_ALIGNED, out_page[PAGE_SIZE] PAGE_ALIGNED;
static void read_word(unsigned long a) { (void)*(volatile uint64_t *)a; }

static long reservation(unsigned cmd, xen_pfn_t *frame, unsigned long count, unsigned order, domid_t dom)
{
    struct xen_memory_reservation r = {.nr_extents = count, .extent_order = order, .domid = dom};
    set_xen_guest_handle(r.extent_start, frame);
    return HYPERVISOR_memory_op(cmd, &r);
}

static long current(void)
{
    domid_t self = DOMID_SELF;
    return HYPERVISOR_memory_op(XENMEM_current_reservation, &self);
}

static void queries(void)
{
    domid_t self = DOMID_SELF, nobody = 0x7123;
    long most = HYPERVISOR_memory_op(XENMEM_maximum_ram_page, NULL);
    ok(most > 0, "maximum_ram_page %ld (the first frame number behind RAM)", most);
    bool below = true;
    for (unsigned long pfn = 0; pfn < start_info->nr_pages; pfn++)
        below &= (long)p2m()[pfn] < most;
    ok(below, "every frame of this guest is below it");
    long now = current();
    ok(now >= (long)start_info->nr_pages, "current_reservation %ld covers start_info's %lu pages", now, start_info->nr_pages);
    most = HYPERVISOR_memory_op(XENMEM_maximum_reservation, &self);
    ok(most >= now, "maximum_reservation is not less");
    if (!is_initial_domain())
        ok(most >= now + 200 && most <= now + 256, "a MiB more, as libxl sets it (%ld frames)", most - now);
    ok(HYPERVISOR_memory_op(XENMEM_current_reservation, &nobody) < 0, "of a domain that is not there: an error");
    same(HYPERVISOR_memory_op(77, NULL), -XEN_ENOSYS, "an unknown command: ENOSYS");
    struct xen_machphys_mapping m2p = {0};
    same(HYPERVISOR_memory_op(XENMEM_machphys_mapping, &m2p), 0, "machphys_mapping");
    same(m2p.v_start, MACH2PHYS_VIRT_START, "begins at the fixed address");
    ok(m2p.max_mfn + 1 >= (xen_ulong_t)most, "and covers all memory");
    static char map[128 * 20];
    struct xen_memory_map e820 = {.nr_entries = 128};
    set_xen_guest_handle(e820.buffer, (void *)map);
    long rc = HYPERVISOR_memory_op(XENMEM_memory_map, &e820);
    ok(rc == -XEN_ENOSYS || (rc == 0 && e820.nr_entries >= 1), "memory_map is there, or ENOSYS (%ld)", rc);
    same(HYPERVISOR_memory_op(XENMEM_current_reservation, (void *)0x1000), -XEN_EFAULT, "arguments that are not mapped: EFAULT");
}

static void balloon(void)
{
    long before = current();
    unsigned long pfn = virt_to_pfn(page);
    xen_pfn_t frame = virt_to_mfn(page);
    same(set_pte(page, 0), 0, "unmap a page");
    same(reservation(XENMEM_decrease_reservation, &frame, 1, 0, DOMID_SELF), 1, "decrease_reservation by it");
    same(current(), before - 1, "the reservation is one less");
    ok(set_pte(page, (uint64_t)frame << PAGE_SHIFT | PTE_RW) < 0 || is_initial_domain(), "the frame cannot be mapped any more");
    set_pte(page, 0);
    p2m()[pfn] = ~0ul;
    xen_pfn_t again = frame;
    same(reservation(XENMEM_decrease_reservation, &again, 1, 0, DOMID_SELF), 0, "nor be given back twice");
    xen_pfn_t got = pfn;
    same(reservation(XENMEM_populate_physmap, &got, 1, 0, DOMID_SELF), 1, "populate_physmap for the same pfn");
    same(current(), before, "the reservation is as before");
    same(machine_to_phys_mapping[got], pfn, "the m2p table has the new frame");
    p2m()[pfn] = got;
    same(set_pte(page, (uint64_t)got << PAGE_SHIFT | PTE_RW), 0, "it can be mapped");
    bool zero = true;
    for (unsigned i = 0; i < PAGE_SIZE; i++)
        zero &= page[i] == 0;
    ok(zero, "and is zero");
    page[5] = 5;
    same(page[5], 5, "it is memory");
    xen_pfn_t list[2] = {virt_to_mfn(page), 0xfffffff};
    set_pte(page, 0);
    same(reservation(XENMEM_decrease_reservation, list, 2, 0, DOMID_SELF), 1, "of two frames, the second not its own, one is taken");
    p2m()[pfn] = ~0ul;
    xen_pfn_t fresh = 0;
    same(reservation(XENMEM_increase_reservation, &fresh, 1, 0, DOMID_SELF), 1, "increase_reservation by one");
    same(current(), before, "the reservation is as before");
    struct mmu_update entry = {.ptr = (uint64_t)fresh << PAGE_SHIFT | MMU_MACHPHYS_UPDATE, .val = pfn};
    same(HYPERVISOR_mmu_update(&entry, 1, NULL, DOMID_SELF), 0, "the guest enters it in the m2p table");
    same(machine_to_phys_mapping[fresh], pfn, "where it is");
    p2m()[pfn] = fresh;
    same(set_pte(page, (uint64_t)fresh << PAGE_SHIFT | PTE_RW), 0, "and maps it");
    same(attempt(read_word, (unsigned long)page), -1, "it can be read");
    same(reservation(XENMEM_decrease_reservation, &fresh, 1, 0, 0x7123), 0, "for a domain that is not there: none is taken");
}

static void exchange(void)
{
    unsigned long pfn = virt_to_pfn(out_page);
    xen_pfn_t in = virt_to_mfn(out_page), out = pfn;
    set_pte(out_page, 0);
    struct xen_memory_exchange x = {
        .in = {.nr_extents = 1, .extent_order = 0, .domid = DOMID_SELF},
        .out = {.nr_extents = 1, .extent_order = 0, .domid = DOMID_SELF},
    };
    set_xen_guest_handle(x.in.extent_start, &in);
    set_xen_guest_handle(x.out.extent_start, &out);
    same(HYPERVISOR_memory_op(XENMEM_exchange, &x), 0, "exchange of one frame");
    same(x.nr_exchanged, 1, "one was exchanged");
    same(machine_to_phys_mapping[out], pfn, "the m2p table has the new one");
    p2m()[pfn] = out;
    same(set_pte(out_page, (uint64_t)out << PAGE_SHIFT | PTE_RW), 0, "which can be mapped");
    x.nr_exchanged = 0;
    x.out.nr_extents = 2;
    same(HYPERVISOR_memory_op(XENMEM_exchange, &x), -XEN_EINVAL, "one for two: EINVAL");
}

void program(void)
{
    queries();
    balloon();
    exchange();
}
