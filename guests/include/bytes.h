/* Code given as bytes, run in the kernel and in user mode, with its faults caught (lib/bytes.c). */
#ifndef BYTES_H
#define BYTES_H

#include <guest.h>

#define USER_CODE 0x400000ul
#define USER_STACK 0x401000ul
#define NOT_CANONICAL (1ul << 63)

/* RAX, RCX, RDX go in and come out; in the kernel RBX points at `data`, in user mode at USER_STACK + 64. */
struct bytes_regs { uint64_t rax, rcx, rdx; };
extern struct bytes_regs regs;
extern uint64_t data[8];
extern char code[], user_stack[];

/* Makes a user mode: one page of code, one of stack. */
void bytes_init(void);
/* The vector that the bytes trap with, -1 for none. The frame is in `caught`. */
int kernel(const char *bytes, size_t size, uint64_t rax);
#define KERNEL(bytes, rax) kernel(bytes, sizeof(bytes) - 1, rax)
/* The same in user mode, where SYSCALL ends the bytes: NOTHING then. */
int user(const char *bytes, size_t size, uint64_t rax);
#define USER(bytes, rax) user(bytes, sizeof(bytes) - 1, rax)
#define NOTHING VECTOR_SYSCALL

#endif
