// The DSDT of a PVH guest that was given devices: a PCI root, bus 0, configured through ports 0xCF8 to 0xCFF.
DefinitionBlock ("", "DSDT", 2, "Xen", "HVM", 0)
{
    Scope (\_SB)
    {
        Device (PCI0)
        {
            Name (_HID, EisaId ("PNP0A03"))
            Name (_UID, Zero)
            Name (_ADR, Zero)
            Name (_BBN, Zero)
            Name (_CRS, ResourceTemplate ()
            {
                WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode,
                    0x0000, 0x0000, 0x0000, 0x0000, 0x0001)
                IO (Decode16, 0x0CF8, 0x0CF8, 0x01, 0x08)
                DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,
                    0x00000000, 0xF0000000, 0xFBFFFFFF, 0x00000000, 0x0C000000)
            })
        }
    }
}
