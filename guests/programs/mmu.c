/* Page-table updates by hypercall and by writing, pins, page types, descriptor tables: a page table is never writable. */
#include <guest.h>

const char program_name[] = "mmu";

static char page[PAGE_SIZE] PAGE_ALIGNED, other[PAGE_SIZE] PAGE_ALIGNED, table[PAGE_SIZE] PAGE_ALIGNED, window[PAGE_SIZE] PAGE_ALIGNED;
static char root[PAGE_SIZE] PAGE_ALIGNED;
static uint64_t entry(const void *p, uint64_t flags) { return (uint64_t)virt_to_mfn(p) << PAGE_SHIFT | flags; }

static long ext(unsigned cmd, unsigned long mfn)
{
    struct mmuext_op op = {.cmd = cmd, .arg1.mfn = mfn};
    return HYPERVISOR_mmuext_op(&op, 1, NULL, DOMID_SELF);
}

static long update(uint64_t ptr, uint64_t value, unsigned *done)
{
    struct mmu_update req = {.ptr = ptr, .val = value};
    return HYPERVISOR_mmu_update(&req, 1, done, DOMID_SELF);
}

static void write_word(unsigned long a) { *(volatile uint64_t *)a = 0x1234; }
static bool writable(void *at) { return attempt(write_word, (unsigned long)at) == -1; }

static void mappings(void)
{
    same(set_pte(window, entry(page, PTE_RW)), 0, "map a page a second time, writable");
    *(uint64_t *)window = 0xabcd;
    same(*(uint64_t *)page, 0xabcd, "both mappings show the same memory");
    /* Xen makes entries with the user bit global (0x100), so that both modes share the translation. */
    same(read_pte(window) & ~(PTE_A | PTE_D | 0x100), entry(page, PTE_P | PTE_W | PTE_U), "the entry is what was written");
    same(set_pte(window, entry(page, PTE_P | PTE_W)), 0, "map it without the user bit");
    same(read_pte(window) & PTE_U, PTE_U, "the hypervisor adds the user bit: a 64-bit PV kernel runs at CPL3");
    unsigned done = 9;
    same(update(pte_machine_address(window) | MMU_NORMAL_PT_UPDATE, entry(other, PTE_RW), &done), 0, "mmu_update maps another page");
    same(done, 1, "and counts it");
    ext(MMUEXT_TLB_FLUSH_LOCAL, 0);
    *(uint64_t *)window = 0x7777;
    same(*(uint64_t *)other, 0x7777, "which is seen after a flush");
    same(update(pte_machine_address(window) | MMU_PT_UPDATE_PRESERVE_AD, entry(other, PTE_P | PTE_W | PTE_U), &done), 0, "MMU_PT_UPDATE_PRESERVE_AD");
    same(read_pte(window) & PTE_D, PTE_D, "keeps the dirty bit");
    same(update((uint64_t)virt_to_mfn(page) << PAGE_SHIFT | MMU_MACHPHYS_UPDATE, virt_to_pfn(page), &done), 0, "MMU_MACHPHYS_UPDATE of its own frame");
    /* Cache attributes are for domains that may reach I/O resources, such as the initial one. */
    same(set_pte(window, entry(page, PTE_RW | PTE_PS)), is_initial_domain() ? 0 : -XEN_EINVAL,
         "bit 7 in a level 1 entry is PAT, no large page: for those with I/O resources");
    same(set_pte(window, 0), 0, "clear the entry");
    ok(!writable(window), "nothing is there then");
    struct mmu_update several[] = {
        {.ptr = pte_machine_address(window), .val = entry(page, PTE_RO)},
        {.ptr = pte_machine_address(window), .val = entry((void *)start_info->pt_base, PTE_RW)},
        {.ptr = pte_machine_address(window), .val = 0},
    };
    ok(HYPERVISOR_mmu_update(several, 3, &done, DOMID_SELF) < 0, "a bad update in a batch fails");
    same(done, 1, "those before it are done");
    same(read_pte(window) & PTE_FRAME, entry(page, 0), "and stay, those behind it are not");
    multicall_entry_t calls[2] = {
        {.op = __HYPERVISOR_update_va_mapping, .args = {(unsigned long)window, entry(other, PTE_RW), UVMF_INVLPG}},
        {.op = __HYPERVISOR_update_va_mapping, .args = {(unsigned long)window, entry((void *)start_info->pt_base, PTE_RW), 0}},
    };
    same(HYPERVISOR_multicall(calls, 2), 0, "a multicall of two mappings");
    same(calls[0].result, 0, "the first worked");
    ok((long)calls[1].result < 0, "the second is refused");
    same(read_pte(window) & PTE_FRAME, entry(other, 0), "the first one's mapping is there");
    set_pte(window, 0);
    ok(HYPERVISOR_update_va_mapping(HYPERVISOR_VIRT_START, entry(page, PTE_RW), 0) < 0, "no mapping in the hypervisor's range");
}

static void page_tables_are_read_only(void)
{
    void *pt = (void *)start_info->pt_base;
    same(set_pte(window, entry(pt, PTE_RW)), -XEN_EBUSY, "a writable mapping of a level 4 table: EBUSY");
    same(set_pte(window, entry(pt, PTE_RO)), 0, "a read-only one is fine");
    ok(!writable(window), "and cannot be written");
    set_pte(window, 0);
    uint64_t l1 = pte_machine_address(page) >> PAGE_SHIFT << PAGE_SHIFT;
    same(set_pte(window, l1 | PTE_RW), -XEN_EBUSY, "a writable mapping of a level 1 table: EBUSY");
    same(update(pte_machine_address(mfn_to_virt(l1 >> PAGE_SHIFT)), l1 | PTE_RW, NULL), -XEN_EBUSY, "nor by mmu_update of its own entry");
    same(read_pte(window), 0, "the refused entry is not there");
    unsigned long mfn = HYPERVISOR_memory_op(XENMEM_maximum_ram_page, NULL);
    while (--mfn && mfn_to_virt(mfn) && virt_to_mfn(mfn_to_virt(mfn)) == mfn)
        ;
    same(set_pte(window, mfn << PAGE_SHIFT | PTE_RO), -XEN_EBUSY, "a frame that is not its own (0x%lx): EBUSY", mfn);
    if (is_initial_domain())
        skip("a frame that does not exist: EPERM", "the initial domain may map devices");
    else
        same(set_pte(window, 0xffffffful << PAGE_SHIFT | PTE_RO), -XEN_EPERM, "a frame that does not exist: EPERM");
    same(set_pte(window, start_info->shared_info | PTE_RW), 0, "the shared info may be mapped again");
    set_pte(window, 0);
}

static void pins(void)
{
    unsigned long mfn = virt_to_mfn(table);
    memset(table, 0, sizeof(table));
    same(ext(MMUEXT_PIN_L1_TABLE, mfn), -XEN_EINVAL, "pin a page that is mapped writable: EINVAL");
    ((uint64_t *)table)[5] = entry(page, PTE_RO);
    same(set_pte(table, entry(table, PTE_RO)), 0, "make it read-only");
    same(ext(MMUEXT_PIN_L1_TABLE, mfn), 0, "pin it as a level 1 table");
    same(set_pte(table, entry(table, PTE_RW)), -XEN_EBUSY, "a pinned table cannot be made writable: EBUSY");
    same(ext(MMUEXT_PIN_L1_TABLE, mfn), -XEN_EINVAL, "pin it again: EINVAL");
    same(ext(MMUEXT_PIN_L2_TABLE, mfn), -XEN_EINVAL, "pin it as another level: EINVAL");
    same(update((uint64_t)mfn << PAGE_SHIFT | 7 * 8, entry(other, PTE_RW), NULL), 0, "mmu_update in the pinned table");
    same(((uint64_t *)table)[7] & PTE_FRAME, entry(other, 0), "the entry is there");
    ok(update((uint64_t)mfn << PAGE_SHIFT | 8 * 8, entry(table, PTE_RW), NULL) < 0, "no writable entry for the table itself");
    same(update((uint64_t)mfn << PAGE_SHIFT | 9 * 8, entry(table, PTE_RO), NULL), 0, "a read-only entry for itself is fine");
    same(update((uint64_t)mfn << PAGE_SHIFT | 9 * 8, 0, NULL), 0, "and is cleared");
    same(ext(MMUEXT_UNPIN_TABLE, mfn), 0, "unpin it");
    same(ext(MMUEXT_UNPIN_TABLE, mfn), -XEN_EINVAL, "unpin it again: EINVAL");
    same(set_pte(table, entry(table, PTE_RW)), 0, "now it can be made writable");

    /* A level 2 table whose entry names a page that cannot be a level 1 table. */
    memset(root, 0, sizeof(root));
    ((uint64_t *)root)[0] = entry(table, PTE_RW);
    set_pte(root, entry(root, PTE_RO));
    ok(ext(MMUEXT_PIN_L2_TABLE, virt_to_mfn(root)) < 0, "a level 2 table that names a writable page cannot be pinned");
    set_pte(root, entry(root, PTE_RW));
    ((uint64_t *)root)[0] = entry(page, PTE_RW | PTE_PS);
    set_pte(root, entry(root, PTE_RO));
    ok(ext(MMUEXT_PIN_L2_TABLE, virt_to_mfn(root)) < 0, "nor one with a large page");
    same(set_pte(root, entry(root, PTE_RW)), 0, "after the refusal it is an ordinary page");
    memset(root, 0, sizeof(root));
    memset(table, 0, sizeof(table));
}

static void operations(void)
{
    unsigned long pt = virt_to_mfn((void *)start_info->pt_base);
    same(ext(MMUEXT_NEW_BASEPTR, pt), 0, "NEW_BASEPTR with the current root");
    ok(ext(MMUEXT_NEW_BASEPTR, virt_to_mfn(page)) < 0, "NEW_BASEPTR with a writable page is refused");
    struct mmuext_op flush = {.cmd = MMUEXT_INVLPG_LOCAL, .arg1.linear_addr = (unsigned long)page};
    same(HYPERVISOR_mmuext_op(&flush, 1, NULL, DOMID_SELF), 0, "INVLPG_LOCAL");
    same(ext(MMUEXT_TLB_FLUSH_LOCAL, 0), 0, "TLB_FLUSH_LOCAL");
    same(ext(MMUEXT_TLB_FLUSH_ALL, 0), 0, "TLB_FLUSH_ALL");
    memset(page, 0x77, PAGE_SIZE);
    same(ext(MMUEXT_CLEAR_PAGE, virt_to_mfn(page)), 0, "CLEAR_PAGE");
    ok(page[0] == 0 && page[4095] == 0, "clears it");
    memset(other, 0x33, PAGE_SIZE);
    struct mmuext_op copy = {.cmd = MMUEXT_COPY_PAGE, .arg1.mfn = virt_to_mfn(page), .arg2.src_mfn = virt_to_mfn(other)};
    same(HYPERVISOR_mmuext_op(&copy, 1, NULL, DOMID_SELF), 0, "COPY_PAGE");
    ok(page[0] == 0x33 && page[4095] == 0x33, "copies it");
    ok(ext(MMUEXT_CLEAR_PAGE, pt) < 0, "CLEAR_PAGE of a page table is refused");
    same(ext(77, 0), -XEN_ENOSYS, "an unknown operation: ENOSYS");
    struct mmuext_op batch[2] = {{.cmd = MMUEXT_TLB_FLUSH_LOCAL}, {.cmd = 77}};
    unsigned done = 9;
    same(HYPERVISOR_mmuext_op(batch, 2, &done, DOMID_SELF), -XEN_ENOSYS, "a batch stops at it");
    same(done, 1, "with those before it done");
    struct mmuext_op ldt = {.cmd = MMUEXT_SET_LDT, .arg1.linear_addr = 0, .arg2.nr_ents = 0};
    same(HYPERVISOR_mmuext_op(&ldt, 1, NULL, DOMID_SELF), 0, "an empty LDT");
    ldt.arg1.linear_addr = 1;
    ldt.arg2.nr_ents = 8;
    same(HYPERVISOR_mmuext_op(&ldt, 1, NULL, DOMID_SELF), -XEN_EINVAL, "an LDT that does not begin with a page: EINVAL");
    same(HYPERVISOR_mmu_update(NULL, 0, NULL, 0x7123), -XEN_ESRCH, "mmu_update for a domain that is not there: ESRCH");
}

static void descriptor_tables(void)
{
    unsigned long frames[1] = {virt_to_mfn(other)};
    memset(other, 0, PAGE_SIZE);
    same(hypercall(__HYPERVISOR_set_gdt, frames, 8, 0, 0), -XEN_EINVAL, "a GDT on a page that is mapped writable: EINVAL");
    same(set_pte(other, entry(other, PTE_RO)), 0, "make it read-only");
    same(hypercall(__HYPERVISOR_set_gdt, frames, 8, 0, 0), 0, "set_gdt");
    same(set_pte(other, entry(other, PTE_RW)), -XEN_EBUSY, "its page cannot be made writable: EBUSY");
    uint64_t data_segment = 0x00cff3000000fffful;
    same(hypercall(__HYPERVISOR_update_descriptor, (uint64_t)frames[0] << PAGE_SHIFT | 3 * 8, data_segment, 0, 0), 0, "update_descriptor");
    same(((uint64_t *)other)[3] & ~(1ul << 40), data_segment & ~(1ul << 40), "it is there");
    uint64_t kernel_gate = 0x00008e0000000000ul;
    same(hypercall(__HYPERVISOR_update_descriptor, (uint64_t)frames[0] << PAGE_SHIFT | 4 * 8, kernel_gate, 0, 0), -XEN_EINVAL, "an interrupt gate: EINVAL");
    same(hypercall(__HYPERVISOR_update_descriptor, (uint64_t)frames[0] << PAGE_SHIFT | 3, data_segment, 0, 0), -XEN_EINVAL, "an address that is no descriptor's: EINVAL");
    uint16_t selector = 3 * 8 + 3, seen;
    __asm__ volatile("mov %1, %%es; mov %%es, %0" : "=r"(seen) : "r"(selector));
    same(seen, selector, "the descriptor can be loaded");
    __asm__ volatile("mov %0, %%es" : : "r"(0));
    same(hypercall(__HYPERVISOR_set_gdt, frames, 9000, 0, 0), -XEN_EINVAL, "a GDT with too many entries: EINVAL");
    same(hypercall(__HYPERVISOR_set_gdt, frames, 0, 0, 0), 0, "an empty GDT");
    same(set_pte(other, entry(other, PTE_RW)), 0, "the page is an ordinary one again");
}

static void writable_page_tables(void)
{
    volatile uint64_t *slot;
    uint64_t at = pte_machine_address(window);
    slot = (uint64_t *)((char *)mfn_to_virt(at >> PAGE_SHIFT) + (at & (PAGE_SIZE - 1)));
    same(HYPERVISOR_vm_assist(VMASST_CMD_enable, VMASST_TYPE_writable_pagetables), 0, "enable the writable page-table assist");
    *slot = entry(page, PTE_RW);
    ext(MMUEXT_TLB_FLUSH_LOCAL, 0);
    same(*slot & PTE_FRAME, entry(page, 0), "MOV to a page table is done by the hypervisor");
    *(uint64_t *)window = 0x4321;
    same(*(uint64_t *)page, 0x4321, "and the mapping is there");
    uint64_t old = __atomic_exchange_n(slot, entry(other, PTE_RW), __ATOMIC_SEQ_CST);
    same(old & PTE_FRAME, entry(page, 0), "XCHG gives the old entry");
    uint64_t expected = *slot;
    ok(__atomic_compare_exchange_n(slot, &expected, 0, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST), "CMPXCHG that matches");
    same(*slot, 0, "clears it");
    expected = 0x999;
    ok(!__atomic_compare_exchange_n(slot, &expected, 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST) && expected == 0, "CMPXCHG that does not");
    void (*bad)(unsigned long) = write_word;
    same(attempt(bad, (unsigned long)slot), -1, "a non-present entry may be anything");
    *slot = 0;
    extern void write_pt_entry(unsigned long);
    same(attempt(write_pt_entry, (unsigned long)slot), 14, "an entry that would make a table writable is #PF");
    same(caught.error, 3, "error code 3");
    same(*slot, 0, "and nothing was written");
    same(HYPERVISOR_vm_assist(VMASST_CMD_disable, VMASST_TYPE_writable_pagetables), 0, "disable the assist");
    if (is_initial_domain())
        skip("writes without the assist fault", "the initial domain always has it");
    else
        same(attempt(bad, (unsigned long)slot), 14, "without it a write is #PF");
    same(HYPERVISOR_vm_assist(VMASST_CMD_enable, 63), -XEN_EINVAL, "an unknown assist: EINVAL");
    same(HYPERVISOR_vm_assist(7, VMASST_TYPE_writable_pagetables), -XEN_ENOSYS, "an unknown command: ENOSYS");
}

void write_pt_entry(unsigned long slot) { *(volatile uint64_t *)slot = entry((void *)start_info->pt_base, PTE_RW); }

void program(void)
{
    mappings();
    page_tables_are_read_only();
    pins();
    operations();
    descriptor_tables();
    writable_page_tables();
}
