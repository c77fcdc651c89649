"""HVM_PARAM_*: what HVMOP_set_param and HVMOP_get_param set and read (hvm/params.h)."""

from __future__ import annotations

from typing import Final

HVM_PARAM_PAE_ENABLED: Final = 4
HVM_PARAM_DM_DOMAIN: Final = 13
HVM_PARAM_MEMORY_EVENT_CR0: Final = 20
HVM_PARAM_MEMORY_EVENT_CR3: Final = 21
HVM_PARAM_MEMORY_EVENT_CR4: Final = 22
HVM_PARAM_MEMORY_EVENT_INT3: Final = 23
HVM_PARAM_NESTEDHVM: Final = 24
HVM_PARAM_MEMORY_EVENT_SINGLE_STEP: Final = 25
HVM_PARAM_BUFIOREQ_EVTCHN: Final = 26
HVM_PARAM_MEMORY_EVENT_MSR: Final = 30
HVM_PARAM_CALLBACK_IRQ: Final = 0
HVM_PARAM_CALLBACK_IRQ_TYPE_MASK: Final = 0xFF00000000000000
HVM_PARAM_CALLBACK_TYPE_GSI: Final = 0
HVM_PARAM_CALLBACK_TYPE_PCI_INTX: Final = 1
HVM_PARAM_CALLBACK_TYPE_VECTOR: Final = 2
HVM_PARAM_STORE_PFN: Final = 1
HVM_PARAM_STORE_EVTCHN: Final = 2
HVM_PARAM_IOREQ_PFN: Final = 5
HVM_PARAM_BUFIOREQ_PFN: Final = 6
HVM_PARAM_VIRIDIAN: Final = 9

HVMPV_base_freq: Final = 1
HVMPV_no_freq: Final = 2
HVMPV_time_ref_count: Final = 4
HVMPV_reference_tsc: Final = 8
HVMPV_hcall_remote_tlb_flush: Final = 16
HVMPV_apic_assist: Final = 32
HVMPV_crash_ctl: Final = 64
HVMPV_synic: Final = 128
HVMPV_stimer: Final = 256
HVMPV_hcall_ipi: Final = 512
HVMPV_ex_processor_masks: Final = 1024
HVMPV_no_vp_limit: Final = 2048
HVMPV_cpu_hotplug: Final = 0x1000
HVMPV_feature_mask: Final = (
    HVMPV_base_freq
    | HVMPV_no_freq
    | HVMPV_time_ref_count
    | HVMPV_reference_tsc
    | HVMPV_hcall_remote_tlb_flush
    | HVMPV_apic_assist
    | HVMPV_crash_ctl
    | HVMPV_synic
    | HVMPV_stimer
    | HVMPV_hcall_ipi
    | HVMPV_ex_processor_masks
    | HVMPV_no_vp_limit
    | HVMPV_cpu_hotplug
)

HVM_PARAM_TIMER_MODE: Final = 10

HVMPTM_delay_for_missed_ticks: Final = 0
HVMPTM_no_delay_for_missed_ticks: Final = 1
HVMPTM_no_missed_ticks_pending: Final = 2
HVMPTM_one_missed_tick_pending: Final = 3

HVM_PARAM_HPET_ENABLED: Final = 11
HVM_PARAM_IDENT_PT: Final = 12
HVM_PARAM_ACPI_S_STATE: Final = 14
HVM_PARAM_VM86_TSS: Final = 15
HVM_PARAM_VPT_ALIGN: Final = 16
HVM_PARAM_CONSOLE_PFN: Final = 17
HVM_PARAM_CONSOLE_EVTCHN: Final = 18
HVM_PARAM_ACPI_IOPORTS_LOCATION: Final = 19
HVM_PARAM_PAGING_RING_PFN: Final = 27
HVM_PARAM_MONITOR_RING_PFN: Final = 28
HVM_PARAM_SHARING_RING_PFN: Final = 29
HVM_PARAM_TRIPLE_FAULT_REASON: Final = 31
HVM_PARAM_IOREQ_SERVER_PFN: Final = 32
HVM_PARAM_NR_IOREQ_SERVER_PAGES: Final = 33
HVM_PARAM_VM_GENERATION_ID_ADDR: Final = 34
HVM_PARAM_ALTP2M: Final = 35

XEN_ALTP2M_disabled: Final = 0
XEN_ALTP2M_mixed: Final = 1
XEN_ALTP2M_external: Final = 2
XEN_ALTP2M_limited: Final = 3

HVM_PARAM_X87_FIP_WIDTH: Final = 36
HVM_PARAM_VM86_TSS_SIZED: Final = 37
HVM_PARAM_MCA_CAP: Final = 38

XEN_HVM_MCA_CAP_LMCE: Final = 1
XEN_HVM_MCA_CAP_MASK: Final = XEN_HVM_MCA_CAP_LMCE

HVM_NR_PARAMS: Final = 39
