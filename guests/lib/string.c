/* Memory, strings and formatted text. */
#include <guest.h>

void *memset(void *d, int c, size_t n)
{
    void *start = d;
    __asm__ volatile("rep stosb" : "+D"(d), "+c"(n) : "a"(c) : "memory");
    return start;
}

void *memcpy(void *d, const void *s, size_t n)
{
    void *start = d;
    __asm__ volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(n) : : "memory");
    return start;
}

int memcmp(const void *a, const void *b, size_t n)
{
    const unsigned char *x = a, *y = b;
    for (; n; n--, x++, y++)
        if (*x != *y)
            return *x - *y;
    return 0;
}

size_t strlen(const char *s)
{
    size_t n = 0;
    while (s[n])
        n++;
    return n;
}

int strcmp(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return (unsigned char)*a - (unsigned char)*b;
}

struct sink {
    char *out;
    size_t room, used;
};

static void put(struct sink *sink, char c)
{
    if (sink->used + 1 < sink->room)
        sink->out[sink->used] = c;
    sink->used++;
}

static void put_number(struct sink *sink, unsigned long value, unsigned base, bool negative, int width, char fill)
{
    char digits[24];
    int n = 0;
    do
        digits[n++] = "0123456789abcdef"[value % base];
    while (value /= base);
    int length = n + negative;
    if (fill == ' ')
        for (; width > length; width--)
            put(sink, ' ');
    if (negative)
        put(sink, '-');
    for (; width > length; width--)
        put(sink, fill);
    while (n)
        put(sink, digits[--n]);
}

int format(char *out, size_t room, const char *text, va_list args)
{
    struct sink sink = {out, room, 0};
    for (; *text; text++) {
        if (*text != '%') {
            put(&sink, *text);
            continue;
        }
        char fill = ' ';
        int width = 0, longs = 0;
        if (*++text == '0')
            fill = '0';
        for (; *text >= '0' && *text <= '9'; text++)
            width = width * 10 + *text - '0';
        for (; *text == 'l' || *text == 'z'; text++)
            longs++;
        switch (*text) {
        case 's':
            for (const char *s = va_arg(args, const char *); *s; s++)
                put(&sink, *s);
            break;
        case 'c':
            put(&sink, (char)va_arg(args, int));
            break;
        case 'd': {
            long v = longs ? va_arg(args, long) : va_arg(args, int);
            put_number(&sink, v < 0 ? -(unsigned long)v : (unsigned long)v, 10, v < 0, width, fill);
            break;
        }
        case 'u':
        case 'x': {
            unsigned long v = longs ? va_arg(args, unsigned long) : va_arg(args, unsigned);
            put_number(&sink, v, *text == 'u' ? 10 : 16, false, width, fill);
            break;
        }
        case 'p':
            put(&sink, '0');
            put(&sink, 'x');
            put_number(&sink, (unsigned long)va_arg(args, void *), 16, false, width, fill);
            break;
        case 0:
            text--;
            break;
        default:
            put(&sink, *text);
        }
    }
    if (room)
        out[sink.used < room ? sink.used : room - 1] = 0;
    return (int)sink.used;
}
