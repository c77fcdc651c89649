/* What a guest finds at its start: start info, shared info, p2m and m2p, and xen_version. */
#include <guest.h>

const char program_name[] = "info";

static void start_of_day(void)
{
    ok(!strcmp(start_info->magic, "xen-3.0-x86_64"), "start_info magic is xen-3.0-x86_64");
    ok(start_info->nr_pages >= 1024, "at least 4 MiB of memory (%lu pages)", start_info->nr_pages);
    ok(start_info->shared_info && !(start_info->shared_info & (PAGE_SIZE - 1)), "shared_info is a page's machine address");
    ok(!(start_info->pt_base & (PAGE_SIZE - 1)), "pt_base is the start of a page");
    ok(start_info->nr_pt_frames >= 4, "at least one table of each of four levels");
    ok(start_info->cmd_line[MAX_GUEST_CMDLINE - 1] == 0, "the command line is closed with a zero");
    same(start_info->mod_start, 0, "no module without a ramdisk");
    bool sane = true;
    for (unsigned long pfn = 0; pfn < start_info->nr_pages; pfn++)
        sane &= machine_to_phys_mapping[p2m()[pfn]] == pfn;
    ok(sane, "the m2p table inverts the p2m list for every frame");
    sane = true;
    for (unsigned i = 0; i < start_info->nr_pt_frames; i++)
        sane &= !(read_pte((char *)start_info->pt_base + i * PAGE_SIZE) & PTE_W);
    ok(sane, "every bootstrap page table is mapped read-only");
    ok(read_pte(start_info) & PTE_W, "start info is mapped writable");
    unsigned char *bss = (unsigned char *)_end - 8;
    ok(bss[0] == 0 && bss[7] == 0, "the end of the image's bss is zero");
    if (is_initial_domain()) {
        skip("console and xenstore pages", "the initial domain has none");
        return;
    }
    ok(mfn_to_virt(start_info->console.domU.mfn) != NULL, "the console page is one of the guest's");
    ok(mfn_to_virt(start_info->store_mfn) != NULL, "the xenstore page is one of the guest's");
    ok(start_info->console.domU.evtchn && start_info->store_evtchn, "console and xenstore have event channels");
    ok(start_info->store_evtchn != start_info->console.domU.evtchn, "two different ones");
}

/* Xen looks at the interface version first: a guest without any right finds it out. */
static void interface_versions(void)
{
    static const struct { unsigned nr; uint32_t version; const char *name; } calls[] = {
        {__HYPERVISOR_sysctl, 0x15, "sysctl"}, {__HYPERVISOR_domctl, 0x15, "domctl"}, {__HYPERVISOR_platform_op, 0x03000001, "platform_op"}};
    static uint32_t op[64];
    for (unsigned i = 0; i < 3; i++) {
        op[0] = 0;
        op[1] = 0;
        same(hypercall(calls[i].nr, op, 0, 0, 0), -XEN_EACCES, "%s with another version, no such command: EACCES", calls[i].name);
        op[0] = 1;
        same(hypercall(calls[i].nr, op, 0, 0, 0), -XEN_EACCES, "with a command");
        op[1] = calls[i].version;
        if (!is_initial_domain())
            same(hypercall(calls[i].nr, op, 0, 0, 0), -XEN_EPERM, "with the right version: EPERM");
    }
}

static void version(void)
{
    long v = HYPERVISOR_xen_version(XENVER_version, NULL);
    same(v, 4 << 16 | 17, "XENVER_version is 4.17");
    static char text[1024];
    same(HYPERVISOR_xen_version(XENVER_extraversion, text), 0, "XENVER_extraversion");
    ok(strlen(text) < sizeof(xen_extraversion_t), "it is a closed string: %s", text);
    memset(text, 0x55, sizeof(text));
    same(HYPERVISOR_xen_version(XENVER_capabilities, text), 0, "XENVER_capabilities");
    bool found = false;
    for (char *at = text; *at && at < text + 900; at++)
        found |= !memcmp(at, "xen-3.0-x86_64", 14);
    ok(found, "capabilities name xen-3.0-x86_64");
    static struct xen_compile_info info;
    same(HYPERVISOR_xen_version(XENVER_compile_info, &info), 0, "XENVER_compile_info");
    same(HYPERVISOR_xen_version(XENVER_changeset, text), 0, "XENVER_changeset");
    struct xen_platform_parameters platform = {0};
    same(HYPERVISOR_xen_version(XENVER_platform_parameters, &platform), 0, "XENVER_platform_parameters");
    same(platform.virt_start, HYPERVISOR_VIRT_START, "virt_start is the hypervisor's range");
    same(HYPERVISOR_xen_version(XENVER_pagesize, NULL), PAGE_SIZE, "XENVER_pagesize");
    xen_domain_handle_t handle;
    same(HYPERVISOR_xen_version(XENVER_guest_handle, handle), 0, "XENVER_guest_handle");
    unsigned long half[2];
    memcpy(half, handle, sizeof half);
    note("handle %lx %lx", half[0], half[1]);
    same(HYPERVISOR_xen_version(0x77, text), -XEN_ENOSYS, "an unknown command: ENOSYS");
    same(HYPERVISOR_xen_version(XENVER_extraversion, (void *)0x1000), -XEN_EFAULT, "an address that is not mapped: EFAULT");
}

static void features(void)
{
    struct xen_feature_info f = {.submap_idx = 0};
    same(HYPERVISOR_xen_version(XENVER_get_features, &f), 0, "XENVER_get_features, submap 0");
    ok(f.submap & 1u << XENFEAT_mmu_pt_update_preserve_ad, "mmu_pt_update_preserve_ad");
    ok(f.submap & 1u << XENFEAT_highmem_assist, "highmem_assist");
    ok(f.submap & 1u << XENFEAT_gnttab_map_avail_bits, "gnttab_map_avail_bits");
    ok(!(f.submap & 1u << XENFEAT_auto_translated_physmap), "a PV guest is not auto-translated");
    ok(!(f.submap & 1u << XENFEAT_hvm_callback_vector), "no HVM callback vector");
    same(!!(f.submap & 1u << XENFEAT_dom0), is_initial_domain(), "the dom0 bit agrees with start info");
    f.submap_idx = 1;
    same(HYPERVISOR_xen_version(XENVER_get_features, &f), -XEN_EINVAL, "submap 1: EINVAL");
    same(hypercall(63, 0, 0, 0, 0), -XEN_ENOSYS, "a hypercall number without a hypercall: ENOSYS");
    same(hypercall(47, 0, 0, 0, 0), -XEN_ENOSYS, "another one: ENOSYS");
}

static void shared(void)
{
    ok(vcpu0->time.tsc_to_system_mul != 0, "vCPU time is set up");
    ok(!(vcpu0->time.version & 1), "and not in an update");
    ok(shared_info->wc_version != 0 && !(shared_info->wc_version & 1), "wall clock is set");
    same(vcpu0->evtchn_upcall_mask, 0, "the upcall mask is as this program left it");
}

static void emulated_cpuid(uint32_t leaf, uint32_t *out)
{
    /* XEN_EMULATE_PREFIX, then CPUID. */
    __asm__ volatile(".byte 0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0xa2"
                     : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3])
                     : "0"(leaf), "2"(0));
}

static void cpuid_leaves(void)
{
    uint32_t r[4];
    emulated_cpuid(0x40000000, r);
    ok(r[1] == 0x566e6558 && r[2] == 0x65584d4d && r[3] == 0x4d4d566e, "leaf 0x40000000 says XenVMMXenVMM");
    ok(r[0] >= 0x40000002, "and has at least three leaves");
    emulated_cpuid(0x40000001, r);
    same(r[0], 4 << 16 | 17, "leaf 0x40000001 is the version");
    emulated_cpuid(1, r);
    ok(r[2] >> 31 & 1, "the hypervisor bit");
    ok(r[3] & 1 << 4, "a time stamp counter");
    emulated_cpuid(0x80000001, r);
    ok(r[3] & 1u << 29, "long mode");
}

void program(void)
{
    start_of_day();
    version();
    interface_versions();
    features();
    shared();
    cpuid_leaves();
}
