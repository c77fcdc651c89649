/* PCI: configuration mechanism 1, registers as I/O memory in the page tables, MSI-X vectors as event channels. */
#include "domio.h"

#define ADDRESS 0xCF8
#define DATA 0xCFC
#define ENABLE 0x80000000u
#define PCD 0x10ul

static void select_register(unsigned bdf, unsigned offset)
{
    __asm__ volatile("outl %0, %1" : : "a"(ENABLE | bdf << 8 | (offset & 0xFC)), "d"((uint16_t)ADDRESS));
}

uint32_t pci_read(unsigned bdf, unsigned offset, unsigned size)
{
    uint32_t value;
    uint16_t port = DATA + (offset & 3);
    select_register(bdf, offset);
    if (size == 4)
        __asm__ volatile("inl %1, %0" : "=a"(value) : "d"(port));
    else if (size == 2) {
        uint16_t half;
        __asm__ volatile("inw %1, %0" : "=a"(half) : "d"(port));
        value = half;
    } else {
        uint8_t byte;
        __asm__ volatile("inb %1, %0" : "=a"(byte) : "d"(port));
        value = byte;
    }
    return value;
}

void pci_write(unsigned bdf, unsigned offset, unsigned size, uint32_t value)
{
    uint16_t port = DATA + (offset & 3);
    select_register(bdf, offset);
    if (size == 4)
        __asm__ volatile("outl %0, %1" : : "a"(value), "d"(port));
    else if (size == 2)
        __asm__ volatile("outw %0, %1" : : "a"((uint16_t)value), "d"(port));
    else
        __asm__ volatile("outb %0, %1" : : "a"((uint8_t)value), "d"(port));
}

long map_registers(void *window, uint64_t address, unsigned pages)
{
    struct mmu_update updates[REGISTER_PAGES];
    for (unsigned i = 0; i < pages; i++) {
        updates[i].ptr = pte_machine_address((char *)window + i * PAGE_SIZE) | MMU_NORMAL_PT_UPDATE;
        updates[i].val = (address + i * PAGE_SIZE) | PTE_RW | PCD;
    }
    long rc = HYPERVISOR_mmu_update(updates, pages, NULL, DOMID_IO);
    struct mmuext_op flush = {.cmd = MMUEXT_TLB_FLUSH_LOCAL};
    HYPERVISOR_mmuext_op(&flush, 1, NULL, DOMID_SELF);
    return rc;
}

long bind_vector(unsigned bdf, unsigned entry)
{
    struct physdev_map_pirq map = {
        .domid = DOMID_SELF, .type = MAP_PIRQ_TYPE_MSI, .index = -1, .pirq = -1, .bus = bdf >> 8, .devfn = bdf & 0xFF, .entry_nr = entry};
    long rc = hypercall(__HYPERVISOR_physdev_op, PHYSDEVOP_map_pirq, &map, 0, 0);
    if (rc)
        return rc;
    struct evtchn_bind_pirq bind = {.pirq = map.pirq};
    rc = HYPERVISOR_event_channel_op(EVTCHNOP_bind_pirq, &bind);
    if (!rc)
        return bind.port;
    struct physdev_unmap_pirq unmap = {.domid = DOMID_SELF, .pirq = map.pirq};
    hypercall(__HYPERVISOR_physdev_op, PHYSDEVOP_unmap_pirq, &unmap, 0, 0);
    return rc;
}

void pci_init(void)
{
    struct physdev_set_iopl op = {.iopl = 1}; /* this kernel's ports are the hypervisor's to look at */
    long rc = hypercall(__HYPERVISOR_physdev_op, PHYSDEVOP_set_iopl, &op, 0, 0);
    if (rc)
        say("domio: no I/O ports: %ld", rc);
    for (unsigned bdf = 0; bdf < 256; bdf += 8)
        if (pci_read(bdf, 0, 2) != 0xFFFF)
            say("domio: PCI 00:%02x.0 class %06x", bdf >> 3, pci_read(bdf, PCI_CLASS, 4) >> 8);
}
