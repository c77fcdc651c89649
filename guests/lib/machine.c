/* Start-up, addresses, page-table look-up, time and shutdown. */
#include <guest.h>

start_info_t *start_info;
shared_info_t *shared_info;

static char shared_page[PAGE_SIZE] PAGE_ALIGNED;
extern char _virt_base[];

void guest_main(start_info_t *info)
{
    start_info = info;
    shared_info = (shared_info_t *)shared_page;
    if (HYPERVISOR_update_va_mapping((unsigned long)shared_page, info->shared_info | PTE_RW, UVMF_INVLPG))
        for (;;)
            __asm__ volatile("ud2");
    traps_init();
    events_init();
    program();
    finish();
}

unsigned long virt_to_pfn(const void *va) { return ((unsigned long)va - (unsigned long)_virt_base) >> PAGE_SHIFT; }

unsigned long virt_to_mfn(const void *va) { return p2m()[virt_to_pfn(va)]; }

void *mfn_to_virt(unsigned long mfn)
{
    unsigned long pfn = machine_to_phys_mapping[mfn];
    return pfn < start_info->nr_pages ? _virt_base + (pfn << PAGE_SHIFT) : NULL;
}

uint64_t pte_machine_address(const void *va)
{
    uint64_t *table = (uint64_t *)start_info->pt_base;
    for (int shift = 39;; shift -= 9) {
        unsigned index = (unsigned long)va >> shift & 511;
        if (shift == 12)
            return ((uint64_t)virt_to_mfn(table) << PAGE_SHIFT) + index * 8;
        uint64_t entry = table[index];
        if (!(entry & PTE_P) || (entry & PTE_PS))
            return 0;
        table = mfn_to_virt((entry & PTE_FRAME) >> PAGE_SHIFT);
        if (!table)
            return 0;
    }
}

uint64_t read_pte(const void *va)
{
    uint64_t at = pte_machine_address(va);
    char *table = at ? mfn_to_virt(at >> PAGE_SHIFT) : NULL;
    return table ? *(volatile uint64_t *)(table + (at & (PAGE_SIZE - 1))) : 0;
}

long set_pte(const void *va, uint64_t pte) { return HYPERVISOR_update_va_mapping((unsigned long)va, pte, UVMF_INVLPG); }

uint64_t rdtsc(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

uint64_t time_of(const vcpu_time_info_t *source)
{
    const volatile vcpu_time_info_t *t = source;
    uint32_t version;
    uint64_t now;
    do {
        version = t->version;
        barrier();
        uint64_t delta = rdtsc() - t->tsc_timestamp;
        delta = t->tsc_shift >= 0 ? delta << t->tsc_shift : delta >> -t->tsc_shift;
        now = t->system_time + (uint64_t)((unsigned __int128)delta * t->tsc_to_system_mul >> 32);
        barrier();
    } while ((version & 1) || version != t->version);
    return now;
}

uint64_t system_time(void) { return time_of(&vcpu0->time); }

void shutdown(unsigned reason)
{
    struct sched_shutdown order = {.reason = reason};
    console_flush();
    for (;;)
        HYPERVISOR_sched_op(SCHEDOP_shutdown, &order);
}
