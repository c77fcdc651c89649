/* Hypercalls that kernels seldom make, or make in one way only: callbacks, NMI, lazy FPU, debug registers, assists, batches,
 * the numbers of before 2006, and those that a plain PV guest may not make at all. */
#include <guest.h>
#include <xen/hvm/dm_op.h>
#include <xen/hvm/hvm_op.h>
#include <xen/hvm/params.h>
#include <xen/nmi.h>
#include <xen/physdev.h>

const char program_name[] = "rare";

#define NOT_CANONICAL (1ul << 63)
#define NOWHERE ((void *)0x1000)
#define OTHER 0x7123 /* a domain that is not there */
#define NO_CALL 61
/* The headers show these to tools alone. */
#define XENMEM_get_sharing_freed_pages 18
#define XENMEM_get_sharing_shared_pages 19
#define CR4_DE 8ul

/* --- entry points --- */

static long registered(unsigned type, unsigned long address)
{
    struct callback_register call = {.type = type, .address = address};
    return HYPERVISOR_callback_op(CALLBACKOP_register, &call);
}

static long unregistered(unsigned type)
{
    struct callback_unregister call = {.type = type};
    return HYPERVISOR_callback_op(CALLBACKOP_unregister, &call);
}

static void callbacks(void)
{
    static const unsigned entries[] = {CALLBACKTYPE_event, CALLBACKTYPE_failsafe, CALLBACKTYPE_syscall, CALLBACKTYPE_sysenter,
                                       CALLBACKTYPE_syscall32};
    for (unsigned i = 0; i < ARRAY_SIZE(entries); i++) {
        same(registered(entries[i], NOT_CANONICAL), -XEN_EINVAL, "callback %u at an address that is not canonical", entries[i]);
        same(unregistered(entries[i]), -XEN_EINVAL, "it cannot be taken back");
    }
    same(registered(CALLBACKTYPE_sysenter, (unsigned long)_text), 0, "a callback of SYSENTER");
    same(registered(CALLBACKTYPE_syscall32, (unsigned long)_text), 0, "one of SYSCALL from 32-bit code");
    same(registered(CALLBACKTYPE_nmi, (unsigned long)_text), 0, "one of NMI");
    same(unregistered(CALLBACKTYPE_nmi), 0, "which can be taken back");
    same(unregistered(CALLBACKTYPE_nmi), 0, "twice too");
    same(registered(99, (unsigned long)_text), -XEN_ENOSYS, "no such type");
    same(registered(99, NOT_CANONICAL), -XEN_EINVAL, "the address is looked at first");
    same(unregistered(99), -XEN_ENOSYS, "nor one to take back");
    same(HYPERVISOR_callback_op(CALLBACKOP_register, NOWHERE), -XEN_EFAULT, "what to register is not mapped");
    same(HYPERVISOR_callback_op(CALLBACKOP_unregister, NOWHERE), -XEN_EFAULT, "what to unregister is not mapped");
    same(HYPERVISOR_callback_op(77, NOWHERE), -XEN_ENOSYS, "no such command of callback_op");
    same(HYPERVISOR_set_callbacks(NOT_CANONICAL, NOT_CANONICAL, NOT_CANONICAL), 0, "set_callbacks never fails");
}

static void nmi(void)
{
    struct xennmi_callback call = {.handler_address = (unsigned long)_text};
    same(hypercall(__HYPERVISOR_nmi_op, XENNMI_register_callback, &call, 0, 0), 0, "nmi_op, register");
    same(hypercall(__HYPERVISOR_nmi_op, XENNMI_unregister_callback, NULL, 0, 0), 0, "unregister, without an argument");
    same(hypercall(__HYPERVISOR_nmi_op, XENNMI_register_callback, NOWHERE, 0, 0), -XEN_EFAULT, "not mapped");
    call.handler_address = NOT_CANONICAL;
    same(hypercall(__HYPERVISOR_nmi_op, XENNMI_register_callback, &call, 0, 0), -XEN_EINVAL, "not canonical");
    same(hypercall(__HYPERVISOR_nmi_op, 77, &call, 0, 0), -XEN_ENOSYS, "no such command of nmi_op");
}

static void trap_table(void)
{
    static trap_info_t traps[3];
    traps[0] = (trap_info_t){.vector = 0x91, .cs = FLAT_KERNEL_CS, .address = (unsigned long)_text};
    same(HYPERVISOR_set_trap_table(traps), 0, "a trap table of one entry");
    traps[1] = (trap_info_t){.vector = 0x92, .cs = FLAT_KERNEL_CS, .address = NOT_CANONICAL};
    same(HYPERVISOR_set_trap_table(traps), -XEN_EINVAL, "with an address that is not canonical");
    same(HYPERVISOR_set_trap_table(NOWHERE), -XEN_EFAULT, "not mapped");
}

/* --- lazy FPU --- */

static void x87(unsigned long a) { (void)a; __asm__ volatile("fnop"); }
static void sse(unsigned long a) { (void)a; __asm__ volatile("xorps %%xmm0, %%xmm0" ::: "memory"); }
static unsigned long cr0(void)
{
    unsigned long value;
    __asm__ volatile("mov %%cr0, %0" : "=r"(value));
    return value;
}

static struct { long set; unsigned long before, after; int trap; } tried;
/* The hypercall and then `body`, with nothing between that might use a register of SSE. */
static void try_fpu(unsigned long argument, void (*body)(unsigned long))
{
    tried.set = hypercall(__HYPERVISOR_fpu_taskswitch, argument, 0, 0, 0);
    tried.before = cr0() & 8;
    tried.trap = attempt(body, 0);
    tried.after = cr0() & 8;
    hypercall(__HYPERVISOR_fpu_taskswitch, 0, 0, 0, 0);
}

static void fpu(void)
{
    try_fpu(0, x87);
    same(tried.set, 0, "fpu_taskswitch(0)");
    same(tried.before, 0, "TS is clear");
    same(tried.trap, -1, "an x87 instruction runs");
    try_fpu(1, x87);
    same(tried.set, 0, "fpu_taskswitch(1)");
    same(tried.before, 8, "TS is set");
    same(tried.trap, 7, "the next x87 instruction: #NM");
    same(tried.after, 0, "Xen has cleared TS by then");
    same(attempt(x87, 0), -1, "the next one runs");
    try_fpu(1ul << 32 | 2, sse);
    same(tried.set, 0, "any value but 0 sets it");
    same(tried.trap, 7, "SSE gives #NM too");
    try_fpu(1ul << 32, sse);
    same(tried.set, 0, "the upper half does not count");
    same(tried.trap, -1, "the instruction runs");
}

/* --- debug registers --- */

static long set_dr(unsigned nr, unsigned long value) { return hypercall(__HYPERVISOR_set_debugreg, nr, value, 0, 0); }
static long get_dr(unsigned nr) { return hypercall(__HYPERVISOR_get_debugreg, nr, 0, 0, 0); }
static unsigned long cr4_set(unsigned long set, unsigned long clear)
{
    unsigned long value;
    __asm__ volatile("mov %%cr4, %0" : "=r"(value));
    value = (value | set) & ~clear;
    __asm__ volatile("mov %0, %%cr4" ::"r"(value));
    return value;
}

static void debug_registers(void)
{
    for (unsigned i = 0; i < 4; i++) {
        same(get_dr(i), 0, "DR%u at first", i);
        same(set_dr(i, 0x1230 + i), 0, "is set");
        same(get_dr(i), 0x1230 + i, "and read");
        same(set_dr(i, NOT_CANONICAL), -XEN_EPERM, "not canonical");
        same(set_dr(i, HYPERVISOR_VIRT_START), -XEN_EPERM, "in Xen's range");
        same(get_dr(i), 0x1230 + i, "as it was");
        set_dr(i, 0);
    }
    same(get_dr(6), 0xffff0ff0, "DR6 at first");
    same(get_dr(7), 0x400, "DR7 at first");
    same(set_dr(6, 0), 0, "zero into DR6");
    same(get_dr(6), 0xffff0ff0, "reserved bits stay");
    same(set_dr(6, 0x1000f), 0, "bits of DR6");
    same(get_dr(6), 0xffff0fff, "are kept");
    same(set_dr(6, 1ul << 32), -XEN_EINVAL, "more than 32 bits for DR6");
    same(set_dr(7, 1ul << 32), -XEN_EINVAL, "more than 32 bits for DR7");
    same(set_dr(7, 0x2000), -XEN_EPERM, "general detect");
    same(set_dr(7, 0xdc00), 0, "reserved bits of DR7");
    same(get_dr(7), 0x400, "do not count");
    cr4_set(0, CR4_DE);
    same(set_dr(4, 0), 0, "DR4 is DR6 without CR4.DE");
    same(get_dr(4), 0xffff0ff0, "to read too");
    same(set_dr(5, 0), 0, "DR5 is DR7");
    same(get_dr(5), 0x400, "to read too");
    same(set_dr(7, 0x20001), -XEN_EPERM, "an I/O breakpoint without CR4.DE");
    same(set_dr(7, 0x20000), 0, "not one that is off");
    cr4_set(CR4_DE, 0);
    same(set_dr(4, 0), -XEN_ENODEV, "no DR4 with CR4.DE");
    same(get_dr(4), -XEN_ENODEV, "to read");
    same(set_dr(5, 0), -XEN_ENODEV, "no DR5");
    same(get_dr(5), -XEN_ENODEV, "to read");
    same(set_dr(7, 0x20001), 0, "an I/O breakpoint with CR4.DE");
    same(get_dr(7), 0x20401, "is read back");
    cr4_set(0, CR4_DE);
    same(set_dr(7, 0), 0, "DR7 off");
    same(set_dr(8, 0), -XEN_ENODEV, "no DR8");
    same(get_dr(8), -XEN_ENODEV, "to read");
    same(set_dr(6, 0), 0, "DR6 as at first");
}

/* --- assists --- */

static void assists(void)
{
    static const unsigned known[] = {VMASST_TYPE_writable_pagetables, VMASST_TYPE_m2p_strict, VMASST_TYPE_runstate_update_flag,
                                     VMASST_TYPE_4gb_segments, VMASST_TYPE_4gb_segments_notify, VMASST_TYPE_pae_extended_cr3};
    for (unsigned i = 0; i < ARRAY_SIZE(known); i++) {
        same(HYPERVISOR_vm_assist(VMASST_CMD_enable, known[i]), 0, "assist %u on", known[i]);
        same(HYPERVISOR_vm_assist(VMASST_CMD_enable, known[i]), 0, "again");
        same(HYPERVISOR_vm_assist(VMASST_CMD_disable, known[i]), 0, "off");
    }
    same(HYPERVISOR_vm_assist(VMASST_CMD_enable, 31), -XEN_EINVAL, "no such assist");
    same(HYPERVISOR_vm_assist(VMASST_CMD_enable, 99), -XEN_EINVAL, "nor any behind the word");
    same(HYPERVISOR_vm_assist(7, 99), -XEN_EINVAL, "the assist is looked at first");
    same(HYPERVISOR_vm_assist(7, VMASST_TYPE_m2p_strict), -XEN_ENOSYS, "no such command of vm_assist");
}

/* --- batches --- */

static void batches(void)
{
    static multicall_entry_t inner, calls[4];
    inner = (multicall_entry_t){.op = __HYPERVISOR_xen_version, .args = {XENVER_version}};
    same(HYPERVISOR_multicall(NULL, 0), 0, "a multicall of nothing");
    same(HYPERVISOR_multicall(NOWHERE, 1), -XEN_EFAULT, "not mapped");
    same(HYPERVISOR_multicall(NOT_CANONICAL, 1), -XEN_EFAULT, "not canonical");
    calls[0] = inner;
    calls[1] = (multicall_entry_t){.op = NO_CALL};
    calls[2] = (multicall_entry_t){.op = __HYPERVISOR_multicall, .args = {(unsigned long)&inner, 1}};
    calls[3] = (multicall_entry_t){.op = __HYPERVISOR_xen_version, .args = {0x77}};
    same(HYPERVISOR_multicall(calls, 4), 0, "a multicall of four");
    same(calls[0].result, 4 << 16 | 17, "the first's result");
    same(calls[1].result, -XEN_ENOSYS, "no such hypercall");
    same(calls[2].result, -XEN_EINVAL, "no multicall in a multicall");
    same(calls[3].result, -XEN_ENOSYS, "the others are done all the same");
    calls[0] = (multicall_entry_t){.op = 1ul << 32 | __HYPERVISOR_xen_version};
    same(HYPERVISOR_multicall(calls, 1), 0, "a number of more than 32 bits");
    same(calls[0].result, -XEN_ENOSYS, "is no hypercall's");
    same(hypercall(NO_CALL, 0, 0, 0, 0), -XEN_ENOSYS, "no such hypercall by itself");
}

/* --- another's page tables --- */

static void others_mapping(void)
{
    static char page[PAGE_SIZE] PAGE_ALIGNED;
    uint64_t pte = read_pte(page);
#define MAP(domain) hypercall(__HYPERVISOR_update_va_mapping_otherdomain, page, pte, 0, domain)
    same(MAP(DOMID_SELF), 0, "update_va_mapping_otherdomain of DOMID_SELF");
    same(MAP(OTHER), -XEN_ESRCH, "of a domain that is not there");
    if (is_initial_domain())
        same(MAP(0), -XEN_ESRCH, "its own number is no other domain");
    else
        same(MAP(0), -XEN_EPERM, "of the initial domain");
}

/* --- numbers of before 2006 --- */

static void compat(void)
{
    static evtchn_op_t events;
    static physdev_op_t physdev;
    same(hypercall(__HYPERVISOR_sched_op_compat, SCHEDOP_yield, 0, 0, 0), 0, "sched_op_compat: yield");
    same(hypercall(__HYPERVISOR_sched_op_compat, SCHEDOP_poll, 0, 0, 0), -XEN_ENOSYS, "it has no poll");
    same(hypercall(__HYPERVISOR_sched_op_compat, 77, 0, 0, 0), -XEN_ENOSYS, "nor others");
    events = (evtchn_op_t){.cmd = EVTCHNOP_alloc_unbound, .u.alloc_unbound = {.dom = DOMID_SELF, .remote_dom = DOMID_SELF}};
    same(hypercall(__HYPERVISOR_event_channel_op_compat, &events, 0, 0, 0), 0, "event_channel_op_compat: alloc_unbound");
    ok(events.u.alloc_unbound.port > 0, "a port");
    events.u.close.port = events.u.alloc_unbound.port;
    events.cmd = EVTCHNOP_close;
    same(hypercall(__HYPERVISOR_event_channel_op_compat, &events, 0, 0, 0), 0, "close");
    same(hypercall(__HYPERVISOR_event_channel_op_compat, &events, 0, 0, 0), -XEN_EINVAL, "closed already");
    events.cmd = EVTCHNOP_reset;
    same(hypercall(__HYPERVISOR_event_channel_op_compat, &events, 0, 0, 0), -XEN_ENOSYS, "no reset by this number");
    same(hypercall(__HYPERVISOR_event_channel_op_compat, NOWHERE, 0, 0, 0), -XEN_EFAULT, "not mapped");
    physdev = (physdev_op_t){.cmd = PHYSDEVOP_set_iopl, .u.set_iopl.iopl = 1};
    same(hypercall(__HYPERVISOR_physdev_op_compat, &physdev, 0, 0, 0), 0, "physdev_op_compat: set_iopl");
    physdev.u.set_iopl.iopl = 4;
    same(hypercall(__HYPERVISOR_physdev_op_compat, &physdev, 0, 0, 0), -XEN_EINVAL, "no such level");
    physdev.cmd = 0x777;
    same(hypercall(__HYPERVISOR_physdev_op_compat, &physdev, 0, 0, 0), -XEN_ENOSYS, "no such command");
    same(hypercall(__HYPERVISOR_physdev_op_compat, NOWHERE, 0, 0, 0), -XEN_EFAULT, "not mapped");
}

static void physdev(void)
{
    struct physdev_set_iopl iopl = {.iopl = 4};
    struct physdev_set_iobitmap bitmap = {.nr_ports = 65537};
    struct physdev_eoi eoi = {.irq = 0x10000};
    struct physdev_irq_status_query status = {.irq = 0x10000};
    struct physdev_get_free_pirq pirq = {.type = MAP_PIRQ_TYPE_GSI};
#define PHYSDEV(cmd, arg) hypercall(__HYPERVISOR_physdev_op, cmd, arg, 0, 0)
    same(PHYSDEV(PHYSDEVOP_set_iopl, &iopl), -XEN_EINVAL, "physdev_op: I/O level 4");
    iopl.iopl = 0;
    same(PHYSDEV(PHYSDEVOP_set_iopl, &iopl), 0, "level 0");
    same(PHYSDEV(PHYSDEVOP_set_iopl, NOWHERE), -XEN_EFAULT, "not mapped");
    same(PHYSDEV(PHYSDEVOP_set_iobitmap, &bitmap), -XEN_EINVAL, "more than 65536 ports");
    bitmap.nr_ports = 0;
    same(PHYSDEV(PHYSDEVOP_set_iobitmap, &bitmap), 0, "no I/O bitmap");
    same(PHYSDEV(PHYSDEVOP_eoi, &eoi), -XEN_EINVAL, "the end of an interrupt that is not one");
    same(PHYSDEV(PHYSDEVOP_irq_status_query, &status), -XEN_EINVAL, "its status");
    if (!is_initial_domain()) {
        status.irq = 20;
        same(PHYSDEV(PHYSDEVOP_irq_status_query, &status), 0, "the status of one that is not mapped");
        same(status.flags, XENIRQSTAT_needs_eoi, "says that it needs an end");
        eoi.irq = 20;
        same(PHYSDEV(PHYSDEVOP_eoi, &eoi), -XEN_EINVAL, "the end of one that is not mapped");
        same(PHYSDEV(PHYSDEVOP_get_free_pirq, &pirq), 0, "a free number");
        ok(pirq.pirq > 0, "is told");
    }
    same(PHYSDEV(PHYSDEVOP_irq_status_query, NOWHERE), -XEN_EFAULT, "not mapped");
    same(PHYSDEV(0x777, NOWHERE), -XEN_ENOSYS, "no such command");
}

/* --- what is of HVM guests, of dom0, or not there --- */

static void refused(void)
{
    struct xen_hvm_param param = {.domid = DOMID_SELF, .index = HVM_PARAM_STORE_EVTCHN};
#define HVM(cmd, arg) hypercall(__HYPERVISOR_hvm_op, cmd, arg, 0, 0)
    same(HVM(HVMOP_get_param, &param), -XEN_EINVAL, "hvm_op: a PV guest has no parameters to read");
    same(HVM(HVMOP_set_param, &param), -XEN_EINVAL, "nor to set");
    param.index = HVM_NR_PARAMS;
    same(HVM(HVMOP_get_param, &param), -XEN_EINVAL, "no such parameter");
    param = (struct xen_hvm_param){.domid = OTHER, .index = HVM_PARAM_STORE_EVTCHN};
    same(HVM(HVMOP_get_param, &param), -XEN_ESRCH, "no such domain");
    same(HVM(HVMOP_get_param, NOWHERE), -XEN_EFAULT, "not mapped");
    same(HVM(HVMOP_flush_tlbs, NULL), -XEN_EINVAL, "nor a TLB flush");
    same(HVM(0x777, NULL), -XEN_ENOSYS, "no such command of hvm_op");
    struct xen_dm_op_buf buffer = {.size = 0};
    same(hypercall(__HYPERVISOR_dm_op, OTHER, 0, NULL, 0), -XEN_ESRCH, "dm_op: no such domain");
    same(hypercall(__HYPERVISOR_dm_op, DOMID_SELF, 0, NULL, 0), -XEN_ESRCH, "of itself");
    same(hypercall(__HYPERVISOR_dm_op, OTHER, 99, &buffer, 0), -XEN_E2BIG, "too many buffers");
    same(hypercall(__HYPERVISOR_xsm_op, NOWHERE, 0, 0, 0), -XEN_ENOSYS, "xsm_op: no FLASK");
    same(hypercall(__HYPERVISOR_tmem_op, NOWHERE, 0, 0, 0), -XEN_ENOSYS, "tmem_op");
    same(hypercall(__HYPERVISOR_argo_op, 1, 0, 0, 0), -XEN_ENOSYS, "argo_op");
    same(hypercall(__HYPERVISOR_xenpmu_op, 0, NOWHERE, 0, 0), -XEN_EOPNOTSUPP, "xenpmu_op: no performance counters");
    if (is_initial_domain()) {
        skip("kexec_op, hypfs_op", "the initial domain may");
        return;
    }
    same(hypercall(__HYPERVISOR_kexec_op, 0, NOWHERE, 0, 0), -XEN_EPERM, "kexec_op");
    same(hypercall(__HYPERVISOR_hypfs_op, 0, NULL, 0, 0), -XEN_EPERM, "hypfs_op");
}

/* --- the rest of memory_op, xen_version, vcpu_op, mmuext_op, sched_op, event channels, grants --- */

static void memory(void)
{
    static domid_t self = DOMID_SELF, other = OTHER;
    static xen_pfn_t extents[64];
    static struct xen_machphys_mfn_list list = {.max_extents = 64};
    static struct xen_vnuma_topology_info numa = {.domid = DOMID_SELF};
    static struct xen_mem_acquire_resource resource = {.domid = DOMID_SELF};
    set_xen_guest_handle(list.extent_start, extents);
    shared_info->arch.max_pfn = 0;
    same(HYPERVISOR_memory_op(XENMEM_maximum_gpfn, &self), 0, "maximum_gpfn of a guest that has not told its own");
    shared_info->arch.max_pfn = 1000;
    same(HYPERVISOR_memory_op(XENMEM_maximum_gpfn, &self), 999, "and of one that has");
    same(HYPERVISOR_memory_op(XENMEM_maximum_gpfn, &other), -XEN_ESRCH, "of a domain that is not there");
    same(HYPERVISOR_memory_op(XENMEM_maximum_gpfn, NOWHERE), -XEN_EFAULT, "not mapped");
    same(HYPERVISOR_memory_op(XENMEM_machphys_mfn_list, &list), 0, "machphys_mfn_list");
    ok(list.nr_extents <= 64, "%u extents", list.nr_extents);
    same(HYPERVISOR_memory_op(XENMEM_machphys_mfn_list, NOWHERE), -XEN_EFAULT, "not mapped");
    same(HYPERVISOR_memory_op(XENMEM_get_vnumainfo, &numa), -XEN_EOPNOTSUPP, "no virtual NUMA");
    same(HYPERVISOR_memory_op(XENMEM_get_sharing_freed_pages, NULL), 0, "no page was freed by sharing");
    same(HYPERVISOR_memory_op(XENMEM_get_sharing_shared_pages, NULL), 0, "none is shared");
    same(HYPERVISOR_memory_op(XENMEM_acquire_resource, &resource), -XEN_ESRCH, "acquire_resource of itself");
    resource.domid = OTHER;
    same(HYPERVISOR_memory_op(XENMEM_acquire_resource, &resource), -XEN_ESRCH, "of a domain that is not there");
    resource.pad = 1;
    same(HYPERVISOR_memory_op(XENMEM_acquire_resource, &resource), -XEN_EINVAL, "pad is looked at first");
    same(HYPERVISOR_memory_op(63, NULL), -XEN_ENOSYS, "no such command of memory_op");
}

static void denied(void)
{
    static char text[1024];
    if (is_initial_domain()) {
        skip("XENVER_commandline, XENVER_build_id", "the initial domain may");
        return;
    }
    same(HYPERVISOR_xen_version(XENVER_commandline, text), 0, "XENVER_commandline");
    same(strcmp(text, "<denied>"), 0, "is denied");
    same(HYPERVISOR_xen_version(XENVER_build_id, NULL), -XEN_EPERM, "XENVER_build_id");
    same(HYPERVISOR_sched_op(SCHEDOP_pin_override, NOWHERE), -XEN_EPERM, "SCHEDOP_pin_override");
}

static volatile unsigned nmis;
static void on_nmi(struct frame *frame)
{
    (void)frame;
    nmis++;
}

static void vcpus(void)
{
    static vcpu_guest_context_t context;
    static struct vcpu_register_vcpu_info info;
    static struct vcpu_get_physid physid;
    on_trap(2, on_nmi);
    same(HYPERVISOR_vcpu_op(VCPUOP_send_nmi, 0, &info), -XEN_EINVAL, "VCPUOP_send_nmi takes no argument");
    same(nmis, 0, "none came");
    same(HYPERVISOR_vcpu_op(VCPUOP_send_nmi, 0, NULL), 0, "without one");
    same(nmis, 1, "it comes at once");
    same(HYPERVISOR_vcpu_op(VCPUOP_send_nmi, 0, NULL), 0, "again");
    same(nmis, 2, "the next, too");
    same(HYPERVISOR_vcpu_op(VCPUOP_send_nmi, 9999, NULL), -XEN_ENOENT, "no such vCPU");
    same(HYPERVISOR_vcpu_op(VCPUOP_initialise, 0, &context), -XEN_EEXIST, "VCPUOP_initialise of the one that runs");
    same(HYPERVISOR_vcpu_op(VCPUOP_initialise, 0, NOWHERE), -XEN_EFAULT, "not mapped");
    if (!is_initial_domain())
        same(HYPERVISOR_vcpu_op(VCPUOP_get_physid, 0, &physid), -XEN_EINVAL, "VCPUOP_get_physid");
    info.mfn = virt_to_mfn(&context);
    info.offset = PAGE_SIZE - 8;
    same(HYPERVISOR_vcpu_op(VCPUOP_register_vcpu_info, 0, &info), -XEN_ENXIO, "vcpu_info over the end of a page");
    info.offset = 0;
    info.mfn = ~0ul >> 12;
    same(HYPERVISOR_vcpu_op(VCPUOP_register_vcpu_info, 0, &info), -XEN_EINVAL, "in a frame that is not there");
}

static void flushes(void)
{
    static unsigned long mask = 1;
    static char page[PAGE_SIZE] PAGE_ALIGNED;
    struct mmuext_op op = {.cmd = MMUEXT_TLB_FLUSH_MULTI};
#define EXT() HYPERVISOR_mmuext_op(&op, 1, NULL, DOMID_SELF)
    set_xen_guest_handle(op.arg2.vcpumask, &mask);
    same(EXT(), 0, "TLB_FLUSH_MULTI");
    op.cmd = MMUEXT_INVLPG_MULTI, op.arg1.linear_addr = (unsigned long)page;
    same(EXT(), 0, "INVLPG_MULTI");
    op.arg1.linear_addr = HYPERVISOR_VIRT_START;
    same(EXT(), 0, "of an address of Xen's");
    op.cmd = MMUEXT_INVLPG_ALL;
    same(EXT(), 0, "INVLPG_ALL");
    set_xen_guest_handle(op.arg2.vcpumask, NOWHERE);
    op.cmd = MMUEXT_TLB_FLUSH_MULTI;
    same(EXT(), -XEN_EINVAL, "a mask that is not mapped: EINVAL");
    op.cmd = MMUEXT_INVLPG_MULTI;
    same(EXT(), -XEN_EINVAL, "for INVLPG_MULTI too");
    op = (struct mmuext_op){.cmd = MMUEXT_MARK_SUPER};
    same(EXT(), -XEN_EOPNOTSUPP, "MARK_SUPER");
    op.cmd = MMUEXT_UNMARK_SUPER;
    same(EXT(), -XEN_EOPNOTSUPP, "UNMARK_SUPER");
    op.cmd = 99;
    same(EXT(), -XEN_ENOSYS, "no such command of mmuext_op");
    if (!is_initial_domain()) {
        op.cmd = MMUEXT_FLUSH_CACHE;
        same(EXT(), -XEN_EACCES, "FLUSH_CACHE without a device");
    }
}

static void fifo(void)
{
    static char page[PAGE_SIZE] PAGE_ALIGNED;
    struct evtchn_expand_array expand = {.array_gfn = virt_to_mfn(page)};
    struct evtchn_init_control control = {.control_gfn = virt_to_mfn(page), .vcpu = 9999};
    same(HYPERVISOR_event_channel_op(EVTCHNOP_expand_array, &expand), -XEN_EOPNOTSUPP, "expand_array with the 2-level ABI");
    same(HYPERVISOR_event_channel_op(EVTCHNOP_init_control, &control), -XEN_ENOENT, "init_control of no vCPU");
    control.vcpu = 0;
    control.offset = 4;
    same(HYPERVISOR_event_channel_op(EVTCHNOP_init_control, &control), -XEN_EINVAL, "a control block that is not aligned");
    control.offset = PAGE_SIZE - 8;
    same(HYPERVISOR_event_channel_op(EVTCHNOP_init_control, &control), -XEN_EINVAL, "one over the end of a page");
    control.offset = 0;
    control.control_gfn = ~0ul >> 12;
    same(HYPERVISOR_event_channel_op(EVTCHNOP_init_control, &control), -XEN_EINVAL, "one in a frame that is not there");
}

static void swapped_grants(void)
{
    static char page[PAGE_SIZE] PAGE_ALIGNED;
    xen_pfn_t frame = 0;
    struct gnttab_setup_table table = {.dom = DOMID_SELF, .nr_frames = 1};
    set_xen_guest_handle(table.frame_list, &frame);
    same(HYPERVISOR_grant_table_op(GNTTABOP_setup_table, &table, 1), 0, "setup_table");
    same(table.status, GNTST_okay, "is done");
    same(set_pte(page, frame << PAGE_SHIFT | PTE_RW), 0, "the table is mapped");
    volatile grant_entry_v1_t *entries = (void *)page;
    entries[20].domid = 1, entries[20].frame = 0x111, entries[20].flags = GTF_permit_access;
    entries[21].domid = 2, entries[21].frame = 0x222, entries[21].flags = 0;
    struct gnttab_swap_grant_ref swap = {.ref_a = 20, .ref_b = 21};
#define SWAP() HYPERVISOR_grant_table_op(GNTTABOP_swap_grant_ref, &swap, 1)
    same(SWAP(), 0, "swap_grant_ref");
    same(swap.status, GNTST_okay, "is done");
    ok(entries[21].domid == 1 && entries[21].frame == 0x111 && entries[21].flags == GTF_permit_access, "one is the other");
    ok(entries[20].domid == 2 && entries[20].frame == 0x222 && entries[20].flags == 0, "and the other way round");
    swap.ref_a = 21;
    same(SWAP(), 0, "one with itself");
    same(swap.status, GNTST_okay, "is done");
    swap.ref_b = 1u << 30;
    same(SWAP(), 0, "one beyond the table");
    same(swap.status, GNTST_bad_gntref, "bad_gntref");
    same(HYPERVISOR_grant_table_op(GNTTABOP_swap_grant_ref, NOWHERE, 1), -XEN_EFAULT, "not mapped");
    entries[21].flags = 0;
    struct gnttab_cache_flush flush = {.offset = PAGE_SIZE, .op = GNTTAB_CACHE_CLEAN};
#define FLUSH() HYPERVISOR_grant_table_op(GNTTABOP_cache_flush, &flush, 1)
    same(FLUSH(), -XEN_EINVAL, "cache_flush behind the page");
    flush.offset = 0, flush.length = 64, flush.op = 8;
    same(FLUSH(), -XEN_EINVAL, "of a kind that is not there");
    flush.op = 0;
    same(FLUSH(), 0, "of no kind");
    same(HYPERVISOR_grant_table_op(99, NOWHERE, 1), -XEN_ENOSYS, "no such command of grant_table_op");
}

static void trace(void)
{
    static struct xen_hvm_xentrace trace;
    static struct xen_hvm_get_mem_type type = {.domid = DOMID_SELF};
    same(HVM(HVMOP_guest_request_vm_event, NULL), 0, "a request for a monitor, of which there is none");
    same(HVM(HVMOP_guest_request_vm_event, &trace), -XEN_EINVAL, "and it has no argument");
    same(HVM(HVMOP_xentrace, &trace), 0, "a record for xentrace, from a PV guest too");
    trace.extra_bytes = sizeof(trace.extra) + 1;
    same(HVM(HVMOP_xentrace, &trace), -XEN_EINVAL, "too long");
    trace.extra_bytes = 0, trace.event = 0x1000;
    same(HVM(HVMOP_xentrace, &trace), -XEN_EINVAL, "an event of more than twelve bits");
    same(HVM(HVMOP_xentrace, NOWHERE), -XEN_EFAULT, "not mapped");
    same(HVM(HVMOP_get_mem_type, &type), -XEN_EINVAL, "a PV guest's memory has no types");
}

static void segment_bases(void)
{
    same(HYPERVISOR_set_segment_base(SEGBASE_FS, NOT_CANONICAL), -XEN_EINVAL, "a base of FS that is not canonical");
    same(HYPERVISOR_set_segment_base(SEGBASE_GS_USER, NOT_CANONICAL), -XEN_EINVAL, "of the user's GS");
    same(HYPERVISOR_set_segment_base(SEGBASE_GS_KERNEL, NOT_CANONICAL), -XEN_EINVAL, "of the kernel's");
    same(HYPERVISOR_set_segment_base(77, 0), -XEN_EINVAL, "no such base");
    same(HYPERVISOR_set_segment_base(SEGBASE_GS_USER_SEL, 0), 0, "a null selector for the user's GS");
    same(HYPERVISOR_set_segment_base(SEGBASE_GS_USER_SEL, 0xfff8), 0, "one that cannot be loaded is taken as null");
}

void program(void)
{
    callbacks();
    nmi();
    traps_init();
    fpu();
    debug_registers();
    assists();
    batches();
    others_mapping();
    compat();
    physdev();
    refused();
    memory();
    denied();
    vcpus();
    flushes();
    fifo();
    swapped_grants();
    trace();
    segment_bases();
    trap_table();
}
