/* A program for a Linux guest: what user processes see of the processor through the guest's kernel. TAP lines on standard output;
 * the exit status is the number of checks that failed. */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/time.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

static int count, failed;

static void ok(int passed, const char *what)
{
    printf("%sok %d - %s\n", passed ? "" : "not ", ++count, what);
    failed += !passed;
}

/* --- exceptions as signals */

static sigjmp_buf back;
static volatile int got_signal;
static volatile unsigned long vector, code;

static void on_signal(int number, siginfo_t *info, void *context)
{
    ucontext_t *at = context;
    got_signal = number;
    vector = at->uc_mcontext.gregs[REG_TRAPNO];
    code = at->uc_mcontext.gregs[REG_ERR];
    siglongjmp(back, 1);
}

#define TRAPS(statement) (got_signal = 0, sigsetjmp(back, 1) ? 0 : ({ statement; 0; }), got_signal)

static void exceptions(void)
{
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_NODEFER};
    for (const int *number = (int[]){SIGSEGV, SIGILL, SIGFPE, SIGBUS, SIGTRAP, 0}; *number; number++)
        sigaction(*number, &action, NULL);
    char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    volatile int zero = 0;
    unsigned short x87 = 0x37b;
    ok(TRAPS(*(volatile int *)0x1234 = 1) == SIGSEGV && vector == 14 && code == 6, "write of nothing: #PF, code 6");
    ok(TRAPS(*(volatile int *)0x8000000000001234ul = 1) == SIGSEGV && vector == 13, "address that is not canonical: #GP");
    ok(TRAPS(__asm__ volatile("ud2")) == SIGILL && vector == 6, "UD2: #UD");
    ok(TRAPS(zero = 5 / zero) == SIGFPE && vector == 0, "division by zero: #DE");
    ok(TRAPS(__asm__ volatile("int3")) == SIGTRAP && vector == 3, "INT3: #BP");
    ok(TRAPS(__asm__ volatile("hlt")) == SIGSEGV && vector == 13, "HLT: #GP");
    ok(TRAPS(__asm__ volatile("int $0x81")) == SIGSEGV && vector == 13, "INT 0x81: #GP");
    ok(TRAPS(__asm__ volatile("in $0x80, %%al" ::: "rax")) == SIGSEGV && vector == 13, "IN: #GP");
    ok(TRAPS(__asm__ volatile("fnclex; fldcw %0; fld1; fldz; fdivrp; fwait" ::"m"(x87))) == SIGFPE && vector == 16, "x87: #MF");
    __asm__ volatile("fninit");
    page[0] = (char)0xc3;
    ok(TRAPS(((void (*)(void))page)()) == SIGSEGV && vector == 14 && code & 16, "execution of data: #PF by a fetch");
    ok(TRAPS(__asm__ volatile("pushfq; orq $0x100, (%%rsp); popfq; nop; nop" ::: "memory", "cc")) == SIGTRAP && vector == 1,
       "TF: #DB");
    int wrong = 0;
    for (int round = 0; round < 200; round++) {
        mprotect(page, 4096, PROT_READ);
        wrong += TRAPS(page[8] = 2) != SIGSEGV;
        mprotect(page, 4096, PROT_READ | PROT_WRITE);
        page[8] = 3;
    }
    ok(!wrong, "protection of a page taken and given, 200 rounds");
    mprotect(page, 4096, PROT_READ | PROT_WRITE | PROT_EXEC);
    for (int round = 0; round < 1000; round++) {
        memcpy(page, "\xb8", 1); /* mov eax, round; ret */
        memcpy(page + 1, &round, 4);
        memcpy(page + 5, "\xc3", 1);
        wrong += ((int (*)(void))page)() != round;
    }
    ok(!wrong, "code that is written and run, 1000 rounds");
    long id;
    __asm__ volatile("int $0x80" : "=a"(id) : "0"(20l) : "memory", "r8", "r9", "r10", "r11");
    ok(id == getpid(), "a 32-bit system call by INT 0x80");
}

/* --- processes, threads, time */

static double iterate(double x)
{
    for (int i = 0; i < 200000; i++)
        x = sqrt(x * x + 1.0) * 0.99999;
    return x;
}

static void *add(void *sum)
{
    for (int i = 0; i < 100000; i++)
        __sync_fetch_and_add((long *)sum, 1);
    return NULL;
}

static volatile int alarms;

static void on_alarm(int number)
{
    alarms++;
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

static void many(const char *self)
{
    int wrong = 0, status;
    for (int i = 0; i < 6; i++)
        if (!fork())
            _exit(iterate(i + 1.5) != iterate(i + 1.5));
    while (wait(&status) > 0)
        wrong += status != 0;
    ok(!wrong, "floating point of six processes at once");
    long sum = 0;
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, add, &sum);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    ok(sum == 400000, "locked additions of four threads");
    for (int i = 0; i < 30; i++) {
        pid_t child = fork();
        if (!child)
            execl(self, self, "child", (char *)NULL);
        waitpid(child, &status, 0);
        wrong += !WIFEXITED(status) || WEXITSTATUS(status) != 7;
    }
    ok(!wrong, "fork and exec, 30 times");
    const int pages = 2048;
    char *memory = mmap(NULL, pages << 12, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < pages; i++)
        memory[i << 12] = (char)i;
    pid_t child = fork();
    for (int i = 0; i < pages && !child; i++)
        memory[i << 12] = 1;
    if (!child)
        _exit(0);
    waitpid(child, &status, 0);
    for (int i = 0; i < pages; i++)
        wrong += memory[i << 12] != (char)i;
    ok(!wrong, "copy on write of 2048 pages");
    signal(SIGALRM, on_alarm);
    struct itimerval every = {{0, 20000}, {0, 20000}}, never = {{0, 0}, {0, 0}};
    double began = seconds(), last = began;
    setitimer(ITIMER_REAL, &every, NULL);
    while (alarms < 25) {
        double now = seconds();
        wrong += now < last;
        last = now;
    }
    setitimer(ITIMER_REAL, &never, NULL);
    ok(!wrong, "the monotonic clock never goes back");
    ok(last - began > 0.47, "25 alarms of 20 ms are not early");
}

/* --- a debugger */

static int variable;

__attribute__((noinline)) static void function(int value)
{
    variable = value;
    __asm__ volatile("nop");
}

static long debug_register(pid_t child, int number, long value)
{
    return ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg[number]), value);
}

static int variable_of(pid_t child)
{
    return (int)ptrace(PTRACE_PEEKDATA, child, &variable, 0);
}

static void debugger(void)
{
    int status, steps = 0;
    struct user_regs_struct regs;
    const long start = (long)function;
    pid_t child = fork();
    if (!child) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        for (int i = 0; i < 1000; i++)
            function(i);
        _exit(5);
    }
    waitpid(child, &status, 0);
    long word = ptrace(PTRACE_PEEKTEXT, child, start, 0);
    ptrace(PTRACE_POKETEXT, child, start, (word & ~0xffl) | 0xcc);
    ptrace(PTRACE_CONT, child, 0, 0);
    waitpid(child, &status, 0);
    ptrace(PTRACE_GETREGS, child, 0, &regs);
    ok(WIFSTOPPED(status) && (long)regs.rip == start + 1, "INT3 in another process stops it");
    ptrace(PTRACE_POKETEXT, child, start, word);
    regs.rip = start;
    ptrace(PTRACE_SETREGS, child, 0, &regs);
    unsigned long before = 0;
    for (; steps < 60; steps++) {
        ptrace(PTRACE_SINGLESTEP, child, 0, 0);
        waitpid(child, &status, 0);
        ptrace(PTRACE_GETREGS, child, 0, &regs);
        if (!WIFSTOPPED(status) || regs.rip == before)
            break;
        before = regs.rip;
    }
    ok(steps == 60, "60 single steps, each one further");
    debug_register(child, 0, start);
    ok(!debug_register(child, 7, 1), "an execution breakpoint is accepted");
    for (int hit = 0; hit < 3; hit++) {
        ptrace(PTRACE_CONT, child, 0, 0);
        waitpid(child, &status, 0);
        ptrace(PTRACE_GETREGS, child, 0, &regs);
        long cause = ptrace(PTRACE_PEEKUSER, child, offsetof(struct user, u_debugreg[6]), 0);
        ok(WIFSTOPPED(status) && (long)regs.rip == start && cause & 1, "and stops the process there");
        debug_register(child, 6, 0);
    }
    debug_register(child, 7, 0);
    debug_register(child, 0, (long)&variable);
    ok(!debug_register(child, 7, 1 | 0xd << 16), "a watchpoint on four bytes is accepted");
    int last = variable_of(child);
    for (int hit = 1; hit <= 3; hit++) {
        ptrace(PTRACE_CONT, child, 0, 0);
        waitpid(child, &status, 0);
        long cause = ptrace(PTRACE_PEEKUSER, child, offsetof(struct user, u_debugreg[6]), 0);
        ok(WIFSTOPPED(status) && cause & 1 && variable_of(child) == last + hit, "and stops it behind each write");
        debug_register(child, 6, 0);
    }
    debug_register(child, 7, 0);
    ptrace(PTRACE_CONT, child, 0, 0);
    waitpid(child, &status, 0);
    ok(WIFEXITED(status) && WEXITSTATUS(status) == 5, "without it the process runs to its end");
}

int main(int number, char **arguments)
{
    if (number > 1)
        return 7;
    setvbuf(stdout, NULL, _IONBF, 0);
    exceptions();
    many(arguments[0]);
    debugger();
    printf("1..%d\nprocesses: %d failed\n", count, failed);
    return failed;
}
