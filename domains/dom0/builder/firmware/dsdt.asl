/*
 * The DSDT of an HVM guest: 440FX and PIIX3 with the wiring that Xen gives them (drivers/pc/fabric.py).
 * Compiled by iasl into dsdt_aml.py (python -m domains.dom0.builder.firmware.compile_dsdt).
 *
 * The fields of INFO are written by acpi.py. Interrupts of PCI pins: with the I/O APIC, inputs 16 to 47; with the 8259A, by four links.
 */
DefinitionBlock ("", "DSDT", 2, "Xen", "HVM", 0)
{
    Name (\_S5, Package () { 0, 0, 0, 0 })
    Name (APIC, 0)
    Method (\_PIC, 1) { APIC = Arg0 }

    Scope (\_SB)
    {
        OperationRegion (INFO, SystemMemory, 0xFC000000, 16)
        Field (INFO, AnyAcc, NoLock, Preserve)
        {
            COM1, 1, COM2, 1, HPEP, 1, , 29,
            PMIN, 32,
            PMAX, 32
        }

        Device (PCI0)
        {
            Name (_HID, EisaId ("PNP0A03"))
            Name (_UID, 0)
            Name (_BBN, 0)
            Name (RES, ResourceTemplate ()
            {
                WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, 0, 0, 0xFF, 0, 0x100)
                IO (Decode16, 0x0CF8, 0x0CF8, 1, 8)
                WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange, 0, 0, 0x0CF7, 0, 0x0CF8)
                WordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange, 0, 0x0D00, 0xFFFF, 0, 0xF300)
                DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, Cacheable, ReadWrite,
                    0, 0xA0000, 0xBFFFF, 0, 0x20000)
                DWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, ReadWrite,
                    0, 0xF0000000, 0xFBFFFFFF, 0, 0x0C000000, , , MEM)
            })
            Method (_CRS, 0, Serialized)
            {
                CreateDWordField (RES, ^MEM._MIN, LOW)
                CreateDWordField (RES, ^MEM._MAX, HIGH)
                CreateDWordField (RES, ^MEM._LEN, SIZE)
                LOW = PMIN
                HIGH = PMAX
                SIZE = PMAX - PMIN + 1
                Return (RES)
            }

            /* With the 8259A: device and pin, by link. */
            Name (PRTP, Package ()
            {
                Package () {0x0001FFFF, 0, LNKB, 0}, Package () {0x0001FFFF, 1, LNKC, 0}, Package () {0x0001FFFF, 2, LNKD, 0}, Package () {0x0001FFFF, 3, LNKA, 0},
                Package () {0x0002FFFF, 0, LNKC, 0}, Package () {0x0002FFFF, 1, LNKD, 0}, Package () {0x0002FFFF, 2, LNKA, 0}, Package () {0x0002FFFF, 3, LNKB, 0},
                Package () {0x0003FFFF, 0, LNKD, 0}, Package () {0x0003FFFF, 1, LNKA, 0}, Package () {0x0003FFFF, 2, LNKB, 0}, Package () {0x0003FFFF, 3, LNKC, 0},
                Package () {0x0004FFFF, 0, LNKA, 0}, Package () {0x0004FFFF, 1, LNKB, 0}, Package () {0x0004FFFF, 2, LNKC, 0}, Package () {0x0004FFFF, 3, LNKD, 0},
                Package () {0x0005FFFF, 0, LNKB, 0}, Package () {0x0005FFFF, 1, LNKC, 0}, Package () {0x0005FFFF, 2, LNKD, 0}, Package () {0x0005FFFF, 3, LNKA, 0},
                Package () {0x0006FFFF, 0, LNKC, 0}, Package () {0x0006FFFF, 1, LNKD, 0}, Package () {0x0006FFFF, 2, LNKA, 0}, Package () {0x0006FFFF, 3, LNKB, 0},
                Package () {0x0007FFFF, 0, LNKD, 0}, Package () {0x0007FFFF, 1, LNKA, 0}, Package () {0x0007FFFF, 2, LNKB, 0}, Package () {0x0007FFFF, 3, LNKC, 0},
                Package () {0x0008FFFF, 0, LNKA, 0}, Package () {0x0008FFFF, 1, LNKB, 0}, Package () {0x0008FFFF, 2, LNKC, 0}, Package () {0x0008FFFF, 3, LNKD, 0},
                Package () {0x0009FFFF, 0, LNKB, 0}, Package () {0x0009FFFF, 1, LNKC, 0}, Package () {0x0009FFFF, 2, LNKD, 0}, Package () {0x0009FFFF, 3, LNKA, 0},
                Package () {0x000AFFFF, 0, LNKC, 0}, Package () {0x000AFFFF, 1, LNKD, 0}, Package () {0x000AFFFF, 2, LNKA, 0}, Package () {0x000AFFFF, 3, LNKB, 0},
                Package () {0x000BFFFF, 0, LNKD, 0}, Package () {0x000BFFFF, 1, LNKA, 0}, Package () {0x000BFFFF, 2, LNKB, 0}, Package () {0x000BFFFF, 3, LNKC, 0},
                Package () {0x000CFFFF, 0, LNKA, 0}, Package () {0x000CFFFF, 1, LNKB, 0}, Package () {0x000CFFFF, 2, LNKC, 0}, Package () {0x000CFFFF, 3, LNKD, 0},
                Package () {0x000DFFFF, 0, LNKB, 0}, Package () {0x000DFFFF, 1, LNKC, 0}, Package () {0x000DFFFF, 2, LNKD, 0}, Package () {0x000DFFFF, 3, LNKA, 0},
                Package () {0x000EFFFF, 0, LNKC, 0}, Package () {0x000EFFFF, 1, LNKD, 0}, Package () {0x000EFFFF, 2, LNKA, 0}, Package () {0x000EFFFF, 3, LNKB, 0},
                Package () {0x000FFFFF, 0, LNKD, 0}, Package () {0x000FFFFF, 1, LNKA, 0}, Package () {0x000FFFFF, 2, LNKB, 0}, Package () {0x000FFFFF, 3, LNKC, 0},
                Package () {0x0010FFFF, 0, LNKA, 0}, Package () {0x0010FFFF, 1, LNKB, 0}, Package () {0x0010FFFF, 2, LNKC, 0}, Package () {0x0010FFFF, 3, LNKD, 0},
                Package () {0x0011FFFF, 0, LNKB, 0}, Package () {0x0011FFFF, 1, LNKC, 0}, Package () {0x0011FFFF, 2, LNKD, 0}, Package () {0x0011FFFF, 3, LNKA, 0},
                Package () {0x0012FFFF, 0, LNKC, 0}, Package () {0x0012FFFF, 1, LNKD, 0}, Package () {0x0012FFFF, 2, LNKA, 0}, Package () {0x0012FFFF, 3, LNKB, 0},
                Package () {0x0013FFFF, 0, LNKD, 0}, Package () {0x0013FFFF, 1, LNKA, 0}, Package () {0x0013FFFF, 2, LNKB, 0}, Package () {0x0013FFFF, 3, LNKC, 0},
                Package () {0x0014FFFF, 0, LNKA, 0}, Package () {0x0014FFFF, 1, LNKB, 0}, Package () {0x0014FFFF, 2, LNKC, 0}, Package () {0x0014FFFF, 3, LNKD, 0},
                Package () {0x0015FFFF, 0, LNKB, 0}, Package () {0x0015FFFF, 1, LNKC, 0}, Package () {0x0015FFFF, 2, LNKD, 0}, Package () {0x0015FFFF, 3, LNKA, 0},
                Package () {0x0016FFFF, 0, LNKC, 0}, Package () {0x0016FFFF, 1, LNKD, 0}, Package () {0x0016FFFF, 2, LNKA, 0}, Package () {0x0016FFFF, 3, LNKB, 0},
                Package () {0x0017FFFF, 0, LNKD, 0}, Package () {0x0017FFFF, 1, LNKA, 0}, Package () {0x0017FFFF, 2, LNKB, 0}, Package () {0x0017FFFF, 3, LNKC, 0},
                Package () {0x0018FFFF, 0, LNKA, 0}, Package () {0x0018FFFF, 1, LNKB, 0}, Package () {0x0018FFFF, 2, LNKC, 0}, Package () {0x0018FFFF, 3, LNKD, 0},
                Package () {0x0019FFFF, 0, LNKB, 0}, Package () {0x0019FFFF, 1, LNKC, 0}, Package () {0x0019FFFF, 2, LNKD, 0}, Package () {0x0019FFFF, 3, LNKA, 0},
                Package () {0x001AFFFF, 0, LNKC, 0}, Package () {0x001AFFFF, 1, LNKD, 0}, Package () {0x001AFFFF, 2, LNKA, 0}, Package () {0x001AFFFF, 3, LNKB, 0},
                Package () {0x001BFFFF, 0, LNKD, 0}, Package () {0x001BFFFF, 1, LNKA, 0}, Package () {0x001BFFFF, 2, LNKB, 0}, Package () {0x001BFFFF, 3, LNKC, 0},
                Package () {0x001CFFFF, 0, LNKA, 0}, Package () {0x001CFFFF, 1, LNKB, 0}, Package () {0x001CFFFF, 2, LNKC, 0}, Package () {0x001CFFFF, 3, LNKD, 0},
                Package () {0x001DFFFF, 0, LNKB, 0}, Package () {0x001DFFFF, 1, LNKC, 0}, Package () {0x001DFFFF, 2, LNKD, 0}, Package () {0x001DFFFF, 3, LNKA, 0},
                Package () {0x001EFFFF, 0, LNKC, 0}, Package () {0x001EFFFF, 1, LNKD, 0}, Package () {0x001EFFFF, 2, LNKA, 0}, Package () {0x001EFFFF, 3, LNKB, 0},
                Package () {0x001FFFFF, 0, LNKD, 0}, Package () {0x001FFFFF, 1, LNKA, 0}, Package () {0x001FFFFF, 2, LNKB, 0}, Package () {0x001FFFFF, 3, LNKC, 0}
            })
            /* With the I/O APIC: its inputs. */
            Name (PRTA, Package ()
            {
                Package () {0x0001FFFF, 0, 0, 20}, Package () {0x0001FFFF, 1, 0, 21}, Package () {0x0001FFFF, 2, 0, 22}, Package () {0x0001FFFF, 3, 0, 23},
                Package () {0x0002FFFF, 0, 0, 24}, Package () {0x0002FFFF, 1, 0, 25}, Package () {0x0002FFFF, 2, 0, 26}, Package () {0x0002FFFF, 3, 0, 27},
                Package () {0x0003FFFF, 0, 0, 28}, Package () {0x0003FFFF, 1, 0, 29}, Package () {0x0003FFFF, 2, 0, 30}, Package () {0x0003FFFF, 3, 0, 31},
                Package () {0x0004FFFF, 0, 0, 32}, Package () {0x0004FFFF, 1, 0, 33}, Package () {0x0004FFFF, 2, 0, 34}, Package () {0x0004FFFF, 3, 0, 35},
                Package () {0x0005FFFF, 0, 0, 36}, Package () {0x0005FFFF, 1, 0, 37}, Package () {0x0005FFFF, 2, 0, 38}, Package () {0x0005FFFF, 3, 0, 39},
                Package () {0x0006FFFF, 0, 0, 40}, Package () {0x0006FFFF, 1, 0, 41}, Package () {0x0006FFFF, 2, 0, 42}, Package () {0x0006FFFF, 3, 0, 43},
                Package () {0x0007FFFF, 0, 0, 44}, Package () {0x0007FFFF, 1, 0, 45}, Package () {0x0007FFFF, 2, 0, 46}, Package () {0x0007FFFF, 3, 0, 47},
                Package () {0x0008FFFF, 0, 0, 17}, Package () {0x0008FFFF, 1, 0, 18}, Package () {0x0008FFFF, 2, 0, 19}, Package () {0x0008FFFF, 3, 0, 20},
                Package () {0x0009FFFF, 0, 0, 21}, Package () {0x0009FFFF, 1, 0, 22}, Package () {0x0009FFFF, 2, 0, 23}, Package () {0x0009FFFF, 3, 0, 24},
                Package () {0x000AFFFF, 0, 0, 25}, Package () {0x000AFFFF, 1, 0, 26}, Package () {0x000AFFFF, 2, 0, 27}, Package () {0x000AFFFF, 3, 0, 28},
                Package () {0x000BFFFF, 0, 0, 29}, Package () {0x000BFFFF, 1, 0, 30}, Package () {0x000BFFFF, 2, 0, 31}, Package () {0x000BFFFF, 3, 0, 32},
                Package () {0x000CFFFF, 0, 0, 33}, Package () {0x000CFFFF, 1, 0, 34}, Package () {0x000CFFFF, 2, 0, 35}, Package () {0x000CFFFF, 3, 0, 36},
                Package () {0x000DFFFF, 0, 0, 37}, Package () {0x000DFFFF, 1, 0, 38}, Package () {0x000DFFFF, 2, 0, 39}, Package () {0x000DFFFF, 3, 0, 40},
                Package () {0x000EFFFF, 0, 0, 41}, Package () {0x000EFFFF, 1, 0, 42}, Package () {0x000EFFFF, 2, 0, 43}, Package () {0x000EFFFF, 3, 0, 44},
                Package () {0x000FFFFF, 0, 0, 45}, Package () {0x000FFFFF, 1, 0, 46}, Package () {0x000FFFFF, 2, 0, 47}, Package () {0x000FFFFF, 3, 0, 16},
                Package () {0x0010FFFF, 0, 0, 18}, Package () {0x0010FFFF, 1, 0, 19}, Package () {0x0010FFFF, 2, 0, 20}, Package () {0x0010FFFF, 3, 0, 21},
                Package () {0x0011FFFF, 0, 0, 22}, Package () {0x0011FFFF, 1, 0, 23}, Package () {0x0011FFFF, 2, 0, 24}, Package () {0x0011FFFF, 3, 0, 25},
                Package () {0x0012FFFF, 0, 0, 26}, Package () {0x0012FFFF, 1, 0, 27}, Package () {0x0012FFFF, 2, 0, 28}, Package () {0x0012FFFF, 3, 0, 29},
                Package () {0x0013FFFF, 0, 0, 30}, Package () {0x0013FFFF, 1, 0, 31}, Package () {0x0013FFFF, 2, 0, 32}, Package () {0x0013FFFF, 3, 0, 33},
                Package () {0x0014FFFF, 0, 0, 34}, Package () {0x0014FFFF, 1, 0, 35}, Package () {0x0014FFFF, 2, 0, 36}, Package () {0x0014FFFF, 3, 0, 37},
                Package () {0x0015FFFF, 0, 0, 38}, Package () {0x0015FFFF, 1, 0, 39}, Package () {0x0015FFFF, 2, 0, 40}, Package () {0x0015FFFF, 3, 0, 41},
                Package () {0x0016FFFF, 0, 0, 42}, Package () {0x0016FFFF, 1, 0, 43}, Package () {0x0016FFFF, 2, 0, 44}, Package () {0x0016FFFF, 3, 0, 45},
                Package () {0x0017FFFF, 0, 0, 46}, Package () {0x0017FFFF, 1, 0, 47}, Package () {0x0017FFFF, 2, 0, 16}, Package () {0x0017FFFF, 3, 0, 17},
                Package () {0x0018FFFF, 0, 0, 19}, Package () {0x0018FFFF, 1, 0, 20}, Package () {0x0018FFFF, 2, 0, 21}, Package () {0x0018FFFF, 3, 0, 22},
                Package () {0x0019FFFF, 0, 0, 23}, Package () {0x0019FFFF, 1, 0, 24}, Package () {0x0019FFFF, 2, 0, 25}, Package () {0x0019FFFF, 3, 0, 26},
                Package () {0x001AFFFF, 0, 0, 27}, Package () {0x001AFFFF, 1, 0, 28}, Package () {0x001AFFFF, 2, 0, 29}, Package () {0x001AFFFF, 3, 0, 30},
                Package () {0x001BFFFF, 0, 0, 31}, Package () {0x001BFFFF, 1, 0, 32}, Package () {0x001BFFFF, 2, 0, 33}, Package () {0x001BFFFF, 3, 0, 34},
                Package () {0x001CFFFF, 0, 0, 35}, Package () {0x001CFFFF, 1, 0, 36}, Package () {0x001CFFFF, 2, 0, 37}, Package () {0x001CFFFF, 3, 0, 38},
                Package () {0x001DFFFF, 0, 0, 39}, Package () {0x001DFFFF, 1, 0, 40}, Package () {0x001DFFFF, 2, 0, 41}, Package () {0x001DFFFF, 3, 0, 42},
                Package () {0x001EFFFF, 0, 0, 43}, Package () {0x001EFFFF, 1, 0, 44}, Package () {0x001EFFFF, 2, 0, 45}, Package () {0x001EFFFF, 3, 0, 46},
                Package () {0x001FFFFF, 0, 0, 47}, Package () {0x001FFFFF, 1, 0, 16}, Package () {0x001FFFFF, 2, 0, 17}, Package () {0x001FFFFF, 3, 0, 18}
            })
            Method (_PRT) { If (APIC) { Return (PRTA) } Return (PRTP) }

            Device (ISA)
            {
                Name (_ADR, 0x00010000)
                OperationRegion (PIRQ, PCI_Config, 0x60, 4)
                Field (PIRQ, ByteAcc, NoLock, Preserve) { RTEA, 8, RTEB, 8, RTEC, 8, RTED, 8 }

                Device (PIC)
                {
                    Name (_HID, EisaId ("PNP0000"))
                    Name (_CRS, ResourceTemplate ()
                    {
                        IO (Decode16, 0x20, 0x20, 1, 2)
                        IO (Decode16, 0xA0, 0xA0, 1, 2)
                        IO (Decode16, 0x4D0, 0x4D0, 1, 2)
                        IRQNoFlags () { 2 }
                    })
                }
                Device (TMR)
                {
                    Name (_HID, EisaId ("PNP0100"))
                    Name (_CRS, ResourceTemplate ()
                    {
                        IO (Decode16, 0x40, 0x40, 1, 4)
                        IRQNoFlags () { 0 }
                    })
                }
                Device (RTC)
                {
                    Name (_HID, EisaId ("PNP0B00"))
                    Name (_CRS, ResourceTemplate ()
                    {
                        IO (Decode16, 0x70, 0x70, 1, 2)
                        IRQNoFlags () { 8 }
                    })
                }
                Device (SPKR)
                {
                    Name (_HID, EisaId ("PNP0800"))
                    Name (_CRS, ResourceTemplate () { IO (Decode16, 0x61, 0x61, 1, 1) })
                }
                Device (PS2K)
                {
                    Name (_HID, EisaId ("PNP0303"))
                    Name (_CRS, ResourceTemplate ()
                    {
                        IO (Decode16, 0x60, 0x60, 1, 1)
                        IO (Decode16, 0x64, 0x64, 1, 1)
                        IRQNoFlags () { 1 }
                    })
                }
                Device (PS2M)
                {
                    Name (_HID, EisaId ("PNP0F13"))
                    Name (_CRS, ResourceTemplate () { IRQNoFlags () { 12 } })
                }
                Device (UAR1)
                {
                    Name (_HID, EisaId ("PNP0501"))
                    Name (_UID, 1)
                    Method (_STA) { If (COM1) { Return (0x0F) } Return (0) }
                    Name (_CRS, ResourceTemplate ()
                    {
                        IO (Decode16, 0x3F8, 0x3F8, 8, 8)
                        IRQNoFlags () { 4 }
                    })
                }
                Device (UAR2)
                {
                    Name (_HID, EisaId ("PNP0501"))
                    Name (_UID, 2)
                    Method (_STA) { If (COM2) { Return (0x0F) } Return (0) }
                    Name (_CRS, ResourceTemplate ()
                    {
                        IO (Decode16, 0x2F8, 0x2F8, 8, 8)
                        IRQNoFlags () { 3 }
                    })
                }
                /* Ports that are taken: Xen platform device, ACPI blocks, firmware configuration. */
                Device (SYSR)
                {
                    Name (_HID, EisaId ("PNP0C02"))
                    Name (_UID, 1)
                    Name (_CRS, ResourceTemplate ()
                    {
                        IO (Decode16, 0x10, 0x10, 1, 4)
                        IO (Decode16, 0x92, 0x92, 1, 1)
                        IO (Decode16, 0xB2, 0xB2, 1, 2)
                        IO (Decode16, 0x510, 0x510, 1, 12)
                        IO (Decode16, 0xAFE0, 0xAFE0, 1, 4)
                        IO (Decode16, 0xB000, 0xB000, 1, 0x40)
                    })
                }
            }

            Device (HPET)
            {
                Name (_HID, EisaId ("PNP0103"))
                Method (_STA) { If (HPEP) { Return (0x0F) } Return (0) }
                Name (_CRS, ResourceTemplate () { Memory32Fixed (ReadWrite, 0xFED00000, 0x400) })
            }

            /* Links: what a PIRQ register says, and what it may say. */
            Name (CAN, ResourceTemplate () { IRQ (Level, ActiveLow, Shared) { 5, 10, 11 } })
            Name (IS, ResourceTemplate () { IRQ (Level, ActiveLow, Shared) { 5 } })
            Method (NOW, 1, Serialized)
            {
                CreateWordField (IS, 1, MASK)
                MASK = 0
                If (!(Arg0 & 0x80)) { MASK = 1 << (Arg0 & 15) }
                Return (IS)
            }
            Method (LINE, 1, Serialized)
            {
                CreateWordField (Arg0, 1, MASK)
                Return (FindSetRightBit (MASK) - 1)
            }
            Device (LNKA)
            {
                Name (_HID, EisaId ("PNP0C0F"))
                Name (_UID, 1)
                Method (_STA) { If (^^ISA.RTEA & 0x80) { Return (9) } Return (0x0B) }
                Method (_PRS) { Return (CAN) }
                Method (_CRS) { Return (NOW (^^ISA.RTEA)) }
                Method (_DIS) { ^^ISA.RTEA |= 0x80 }
                Method (_SRS, 1) { ^^ISA.RTEA = LINE (Arg0) }
            }
            Device (LNKB)
            {
                Name (_HID, EisaId ("PNP0C0F"))
                Name (_UID, 2)
                Method (_STA) { If (^^ISA.RTEB & 0x80) { Return (9) } Return (0x0B) }
                Method (_PRS) { Return (CAN) }
                Method (_CRS) { Return (NOW (^^ISA.RTEB)) }
                Method (_DIS) { ^^ISA.RTEB |= 0x80 }
                Method (_SRS, 1) { ^^ISA.RTEB = LINE (Arg0) }
            }
            Device (LNKC)
            {
                Name (_HID, EisaId ("PNP0C0F"))
                Name (_UID, 3)
                Method (_STA) { If (^^ISA.RTEC & 0x80) { Return (9) } Return (0x0B) }
                Method (_PRS) { Return (CAN) }
                Method (_CRS) { Return (NOW (^^ISA.RTEC)) }
                Method (_DIS) { ^^ISA.RTEC |= 0x80 }
                Method (_SRS, 1) { ^^ISA.RTEC = LINE (Arg0) }
            }
            Device (LNKD)
            {
                Name (_HID, EisaId ("PNP0C0F"))
                Name (_UID, 4)
                Method (_STA) { If (^^ISA.RTED & 0x80) { Return (9) } Return (0x0B) }
                Method (_PRS) { Return (CAN) }
                Method (_CRS) { Return (NOW (^^ISA.RTED)) }
                Method (_DIS) { ^^ISA.RTED |= 0x80 }
                Method (_SRS, 1) { ^^ISA.RTED = LINE (Arg0) }
            }
        }
    }
}
