/* Test Anything Protocol on the console. */
#include <guest.h>

static unsigned count, failed;

static void line(bool passed, const char *tail, const char *what, va_list args)
{
    char text[320];
    format(text, sizeof(text), what, args);
    count++;
    failed += !passed;
    print("%sok %u - %s%s\n", passed ? "" : "not ", count, text, tail);
}

void ok(bool passed, const char *what, ...)
{
    va_list args;
    va_start(args, what);
    line(passed, "", what, args);
    va_end(args);
}

static void tail_of(char *tail, size_t room, const char *text, ...)
{
    va_list args;
    va_start(args, text);
    format(tail, room, text, args);
    va_end(args);
}

void same(long got, long want, const char *what, ...)
{
    char tail[96] = "";
    if (got != want)
        tail_of(tail, sizeof(tail), " (got %ld = 0x%lx, want %ld = 0x%lx)", got, got, want, want);
    va_list args;
    va_start(args, what);
    line(got == want, tail, what, args);
    va_end(args);
}

void skip(const char *what, const char *why)
{
    print("ok %u - %s # SKIP %s\n", ++count, what, why);
}

void note(const char *text, ...)
{
    char out[320];
    va_list args;
    va_start(args, text);
    format(out, sizeof(out), text, args);
    va_end(args);
    print("# %s\n", out);
}

void finish(void)
{
    print("1..%u\n# %s: %u of %u passed\n", count, program_name, count - failed, count);
    shutdown(SHUTDOWN_poweroff);
}
