/* Entry stubs for Xen's bounce frames. A frame is RCX, R11, [error code], RIP, CS, RFLAGS, RSP, SS from RSP upwards. */
#define __ASSEMBLY__
#include <xen/xen.h>

.macro  ENTRY name, vector, has_error
        .globl  \name
\name:  pop     %rcx
        pop     %r11
        .if     !\has_error
        push    $0
        .endif
        push    $\vector
        jmp     common
.endm

        .text
common: push    %rdi
        push    %rsi
        push    %rdx
        push    %rcx
        push    %rax
        push    %r8
        push    %r9
        push    %r10
        push    %r11
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        mov     %rsp, %rdi
        cld
        call    trap_entry
        .globl  frame_return
frame_return:
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        pop     %r11
        pop     %r10
        pop     %r9
        pop     %r8
        pop     %rax
        pop     %rcx
        pop     %rdx
        pop     %rsi
        pop     %rdi
        add     $16, %rsp                       /* vector and error code */
        push    $0                              /* iret_context.flags: not in SYSCALL */
        jmp     hypercall_page + __HYPERVISOR_iret * 32

        /* Continue with the given struct frame: never returns. */
        .globl  enter_frame
enter_frame:
        mov     %rdi, %rsp
        jmp     frame_return

        .altmacro
.macro  TRAP number, has_error
        ENTRY   trap_\number, \number, \has_error
.endm
        .set    i, 0
        .rept   32
        .if     (i == 8) || ((i >= 10) && (i <= 14)) || (i == 17) || (i == 21)
        TRAP    %i, 1
        .else
        TRAP    %i, 0
        .endif
        .set    i, i + 1
        .endr
        TRAP    128, 0
        ENTRY   event_entry, 0x100, 0
        ENTRY   syscall_entry, 0x101, 0

        /* Failsafe: RCX, R11, DS, ES, FS, GS, RIP, CS, RFLAGS, RSP, SS. */
        .globl  failsafe_entry
failsafe_entry:
        pop     %rcx
        pop     %r11
        add     $32, %rsp
        push    $0
        push    $0x102
        jmp     common

        /* bool guarded_call(void (*body)(unsigned long), unsigned long argument): false if trap_resume was used. */
        .globl  guarded_call, trap_resume
guarded_call:
        push    %rbx
        push    %rbp
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        mov     %rsp, guarded_rsp(%rip)
        mov     %rdi, %rax
        mov     %rsi, %rdi
        call    *%rax
        mov     $1, %eax
        jmp     1f
trap_resume:
        mov     guarded_rsp(%rip), %rsp
        xor     %eax, %eax
1:      pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %rbp
        pop     %rbx
        ret

        .section .rodata
        .balign 8
        .globl  trap_entries
trap_entries:
.macro  ADDRESS number
        .quad   trap_\number
.endm
        .set    i, 0
        .rept   32
        ADDRESS %i
        .set    i, i + 1
        .endr
        .globl  trap_128

        .bss
        .balign 8
guarded_rsp:
        .skip   8
        .section .note.GNU-stack, "", @progbits
