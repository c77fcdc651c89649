/* What outlives the program: for each disk its connection, its rings' indexes, and each request that was taken, whole.
 *
 * Responses overwrite ring slots, also those of requests that are not answered yet: so a request is here before the consumer index
 * passes it. Stores are seen in the order in which the program made them, up to the one at which it died: `state`, `valid` and the
 * indexes are single stores, made when what they speak for is there.
 */
#include "domio.h"

#define LEDGER_BYTES ((sizeof(struct ledger) + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1))
#define VALID 0x6c656467

static char windows[MAX_DISKS][LEDGER_BYTES] PAGE_ALIGNED;
static bool shown[MAX_DISKS];

_Static_assert(__builtin_offsetof(struct ledger, records) % PAGE_SIZE == 0, "descriptors are copied by grant: they lie in one page");
_Static_assert(sizeof(struct record) == PAGE_SIZE, "a record is a page");

struct ledger *ledger_of(unsigned place)
{
    const char *text = argument("ledger");
    uint64_t first, count;
    unsigned pages = LEDGER_BYTES / PAGE_SIZE;
    if (!text || !number(&text, start_info->nr_pages, &first) || *text++ != ',' || !number(&text, start_info->nr_pages, &count))
        return NULL;
    if ((uint64_t)(place + 1) * pages > count || first + count > start_info->nr_pages)
        return NULL;
    for (unsigned i = 0; !shown[place] && i < pages; i++) {
        uint64_t frame = p2m()[first + place * pages + i];
        if (set_pte(windows[place] + i * PAGE_SIZE, frame << PAGE_SHIFT | PTE_RW))
            return NULL;
    }
    shown[place] = true;
    return (struct ledger *)windows[place];
}

/* These pages are shown elsewhere than the p2m has them: only the page tables know. */
unsigned long ledger_frame(const struct record *record) { return (read_pte(record) & PTE_FRAME) >> PAGE_SHIFT; }

void ledger_begin(struct ledger *ledger, const struct link *link, uint32_t power)
{
    ledger->valid = 0;
    barrier();
    ledger->link = *link;
    for (unsigned i = 0; i < MAX_REQUESTS; i++)
        ledger->records[i].state = LEDGER_FREE;
    for (unsigned q = 0; q < MAX_QUEUES; q++)
        ledger->req_cons[q] = ledger->rsp_prod[q] = 0;
    ledger->dirty = ledger->lost = 0;
    ledger->power = power;
    barrier();
    ledger->valid = VALID;
}

void ledger_power(struct ledger *ledger, uint32_t power)
{
    if (power != ledger->power && ledger->dirty)
        ledger->lost = OWES_FLUSH | OWES_WRITE;
    barrier(); /* who dies in between looks again */
    ledger->power = power;
}

void ledger_end(struct ledger *ledger) { ledger->valid = 0; }
bool ledger_valid(const struct ledger *ledger) { return ledger->valid == VALID; }
