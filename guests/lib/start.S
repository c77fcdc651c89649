/* Entry points, the hypercall page, and the ELF notes that tell Xen how to start this kernel. */
#define __ASSEMBLY__
#include <xen/elfnote.h>
#include <xen/features.h>

        .text
        .globl  _start
_start: cld                                     /* RSI: start info */
        lea     boot_stack_top(%rip), %rsp
        xor     %ebp, %ebp
        mov     %rsi, %rdi
        call    guest_main
1:      ud2
        jmp     1b

        .balign 4096
        .globl  hypercall_page
hypercall_page:
        .skip   4096, 0xcc

        .bss
        .balign 4096
boot_stack:
        .skip   32768
        .globl  boot_stack_top
boot_stack_top:

.macro  NOTE type, kind:vararg
        .pushsection .note.Xen, "a", @note
        .balign 4
        .long   4, 2f - 1f, \type
        .asciz  "Xen"
1:      \kind
2:      .balign 4
        .popsection
.endm

        NOTE    XEN_ELFNOTE_GUEST_OS,           .asciz "domicile-guest"
        NOTE    XEN_ELFNOTE_GUEST_VERSION,      .asciz "1"
        NOTE    XEN_ELFNOTE_XEN_VERSION,        .asciz "xen-3.0"
        NOTE    XEN_ELFNOTE_LOADER,             .asciz "generic"
        NOTE    XEN_ELFNOTE_VIRT_BASE,          .quad _virt_base
        NOTE    XEN_ELFNOTE_PADDR_OFFSET,       .quad 0
        NOTE    XEN_ELFNOTE_ENTRY,              .quad _start
        NOTE    XEN_ELFNOTE_HYPERCALL_PAGE,     .quad hypercall_page
        NOTE    XEN_ELFNOTE_FEATURES,           .asciz "!writable_page_tables|pae_pgdir_above_4gb"
        NOTE    XEN_ELFNOTE_SUPPORTED_FEATURES, .long (1 << XENFEAT_writable_page_tables) | (1 << XENFEAT_dom0)
        NOTE    XEN_ELFNOTE_HV_START_LOW,       .quad 0xffff800000000000

        .section .note.GNU-stack, "", @progbits
