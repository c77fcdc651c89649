/* DomIO as a guest: drives NVMe controllers that its domain was given, and serves the block back end (io/blkif.h) with them.
 *
 *   main.c      start and loop        store.c   xenstore, with watches     pci.c      configuration space, BARs, interrupts
 *   nvme.c      the controller        grants.c  frontends' frames          ledger.c   what outlives the program
 *   requests.c  checked requests      ring.c    rings, both ways           disk.c     XenbusState, nodes, up and down
 *
 * One vCPU, one loop: event handlers only set flags. What a frontend can write (rings, nodes, grants) is copied, checked, then used;
 * one that breaks the rules loses its disk and nothing else.
 */
#ifndef DOMIO_H
#define DOMIO_H

#include <guest.h>
#include <xen/physdev.h>
#include <xen/io/blkif.h>
#include <xen/io/xenbus.h>

#define MAX_DISKS 31          /* controllers of PCI bus 0; a disk's place follows from its controller's device number */
#define MAX_REQUESTS 64       /* of one disk that are taken and not answered */
#define MAX_SEGMENTS 256      /* of an indirect request: their descriptors fill half a page */
#define MAX_QUEUES 2
#define MAX_RING_ORDER 2
#define MAX_RING_PAGES (1 << MAX_RING_ORDER)
#define SLOT_BYTES 112        /* of a ring slot, at most */
#define SECTOR 512
#define NS_MS 1000000ul
#define NS_S 1000000000ul
#define PATH 128

struct disk;
struct request;

/* --- main.c --- */
extern volatile bool work;    /* there is something to do */
void say(const char *text, ...) __attribute__((format(printf, 1, 2)));
/* Block until an event comes or that time; returns at once if `work` is set. */
void idle(uint64_t until);
/* The value of `name=` on the command line, or NULL. */
const char *argument(const char *name);
/* A decimal number at `*text`, which is moved behind it. False: none is there, or it is larger than `most`. */
bool number(const char **text, uint64_t most, uint64_t *value);

/* --- store.c --- */
#define STORE_ROOM 4096
void store_init(bool again);
/* The length of the value or a negative errno; the value is closed with a zero. */
long store_read(const char *path, char *value, size_t room);
/* Names, each closed with a zero; their length together or a negative errno. */
long store_list(const char *path, char *names, size_t room);
long store_write(const char *path, const char *value);
long store_watch(const char *path, const char *token);
long store_unwatch(const char *path, const char *token);
/* Take what has come; `on_watch` is called for each event, and must not make requests. */
void store_pump(void);
extern void (*on_watch)(const char *path, const char *token);
/* Text into a buffer; false if it does not fit. */
bool text_to(char *out, size_t room, const char *text, ...) __attribute__((format(printf, 3, 4)));

/* --- pci.c --- */
#define PCI_COMMAND 4
#define PCI_CLASS 8
#define PCI_BAR0 0x10
#define PCI_MEMORY 2
#define PCI_MASTER 4
#define PCI_CLASS_NVME 0x010802
void pci_init(void);
uint32_t pci_read(unsigned bdf, unsigned offset, unsigned size);
void pci_write(unsigned bdf, unsigned offset, unsigned size, uint32_t value);
/* Show `pages` pages of I/O memory at a page-aligned machine address in a window of the image. A negative errno. */
long map_registers(void *window, uint64_t address, unsigned pages);
/* The device's MSI-X vector `entry` as an event channel; a negative errno. */
long bind_vector(unsigned bdf, unsigned entry);

/* --- nvme.c --- */
#define QUEUE_DEPTH 128
#define REGISTER_PAGES 4
enum nvme_state { NVME_OFF, NVME_RESETTING, NVME_ENABLING, NVME_CONTROLLER, NVME_NAMESPACE, NVME_LOG, NVME_QUEUES, NVME_CQ, NVME_SQ, NVME_READY };

struct nvme {
    unsigned bdf;
    enum nvme_state state;
    uint64_t deadline;        /* of the present step; of an OFF one, when it is started again */
    volatile uint8_t *registers;
    unsigned stride;          /* bytes between doorbells */
    long port;
    uint64_t sectors;
    uint32_t max_bytes;       /* of one transfer */
    uint32_t power_losses;    /* as it counts them */
    bool write_cache, can_discard, told;
    unsigned admin_tail, admin_head, admin_phase, admin_id;
    unsigned tail, head, phase, depth; /* depth: entries of each I/O queue */
    bool unrung;              /* the controller was not told of the tail */
    struct request *commands[QUEUE_DEPTH];
    uint16_t free_ids[QUEUE_DEPTH];
    unsigned free_count;
};

/* A step of bringing the controller up, or a look at one that works. True if it has just become ready. */
bool nvme_step(struct disk *disk, uint64_t now);
/* Completions; `on_done` gets each command's request. True if there were any. */
bool nvme_completions(struct disk *disk, void (*on_done)(struct disk *disk, struct request *request, bool fine));
/* Queue a command for the request: false if there is no room now. `prp` as the specification has it. */
bool nvme_submit(struct disk *disk, struct request *request, unsigned opcode, uint64_t prp1, uint64_t prp2, uint64_t block, uint32_t dword12,
                 uint32_t dword10, uint32_t dword11);
void nvme_ring_doorbell(struct disk *disk);
#define NVME_FLUSH 0
#define NVME_WRITE 1
#define NVME_READ 2
#define NVME_DATASET 9

/* --- requests.c --- */
enum kind { KIND_NONE, KIND_READ, KIND_WRITE, KIND_DISCARD };
enum phase { PHASE_FREE, PHASE_WAITING, PHASE_FLUSH, PHASE_DATA, PHASE_DONE };

struct segment {
    grant_ref_t ref;
    grant_handle_t handle;
    uint64_t address;         /* of the frame, for the device; 0: not mapped */
    uint16_t offset, length;
    bool kept;                /* its mapping is a persistent one */
    bool not_now;             /* it could not be mapped, but may be later */
};

struct request {
    enum phase phase;
    unsigned queue;
    uint32_t index;           /* of the ring */
    uint64_t id;
    uint8_t op;
    enum kind kind;
    bool flush, barrier;
    int16_t status;
    uint64_t sector, sectors;
    unsigned count, cursor;   /* segments; the first that is in no command yet */
    unsigned outstanding, prps;
    uint32_t stamp;           /* of a flush: writes that were completed when it was made */
    bool failed;
    bool not_now;             /* its frames could not all be mapped, but may be later */
    struct request *next;
    struct segment segments[MAX_SEGMENTS];
};

struct fifo {
    struct request *first, **last;
    unsigned length;
};

struct abi {
    unsigned slot, id, sector, segments, grefs, indirect_count;
};

struct record;
/* Check a slot (and an indirect request's descriptors, copied behind it) and say in `request` what there is to do. A `status` other than
 * 1 says that nothing is. */
void parse(const struct disk *disk, const struct abi *abi, const struct record *record, struct request *request);
/* The grant of an indirect request's descriptors and their number; 0 for any other request, or one in error. */
unsigned indirect_of(const struct abi *abi, const uint8_t *raw, grant_ref_t *ref);
void fifo_init(struct fifo *fifo);
void fifo_put(struct fifo *fifo, struct request *request);
void fifo_put_first(struct fifo *fifo, struct request *request);
struct request *fifo_take(struct fifo *fifo);

/* --- ledger.c --- */
enum { LEDGER_FREE, LEDGER_TAKEN, LEDGER_COMPLETED, LEDGER_ANSWERED };

/* A request as it was taken. `state` is stored last, in one go. */
struct record {
    volatile uint32_t state;
    uint32_t index, queue, answer;
    int32_t status;
    uint32_t segment_count;   /* descriptors of an indirect request that were copied */
    uint8_t raw[SLOT_BYTES];
    uint8_t unused[2048 - 24 - SLOT_BYTES];
    struct blkif_request_segment segments[MAX_SEGMENTS];
};

struct link {
    uint32_t queues, pages, abi, persistent;
    domid_t frontend;
    uint32_t refs[MAX_QUEUES][MAX_RING_PAGES];
    evtchn_port_t ports[MAX_QUEUES]; /* the frontend's */
};

struct ledger {
    volatile uint32_t valid;
    struct link link;
    volatile uint32_t req_cons[MAX_QUEUES], rsp_prod[MAX_QUEUES];
    volatile uint32_t dirty;  /* writes were called completed that no flush covers */
    volatile uint32_t lost;   /* such are gone, and these have yet to say so: OWES_* */
    volatile uint32_t power;  /* the controller's count of power losses when that was decided */
    uint8_t unused[4096 - 4 - sizeof(struct link) - 8 * MAX_QUEUES - 12];
    struct record records[MAX_REQUESTS];
};

#define OWES_FLUSH 1u
#define OWES_WRITE 2u

/* The disk's own, in memory that outlives the program; mapped at the first call. NULL: there is no room for it. */
struct ledger *ledger_of(unsigned place);
/* The machine frame of a record. */
unsigned long ledger_frame(const struct record *record);
void ledger_begin(struct ledger *ledger, const struct link *link, uint32_t power);
/* The controller counts so many power losses now: more than before, with writes that no flush covers, and these may be gone. */
void ledger_power(struct ledger *ledger, uint32_t power);
void ledger_end(struct ledger *ledger);
bool ledger_valid(const struct ledger *ledger);

/* --- grants.c --- */
#define MAX_KEPT 1056         /* persistent grants of one disk */
#define KEPT_SLOTS 2048

struct kept {
    grant_ref_t ref;
    grant_handle_t handle;
    uint64_t address;
    bool used;
};

/* Map the segments' frames for the device. False for each request of which one could not be; it holds none then. */
void map_requests(struct disk *disk, struct request **requests, unsigned count, bool *fine);
void unmap_requests(struct request **requests, unsigned count);
/* All that stayed mapped. */
void unmap_kept(struct disk *disk);
/* Ring pages, for the processor. */
bool map_ring(domid_t domid, const uint32_t *refs, unsigned pages, char *window, grant_handle_t *handles);
void unmap_ring(unsigned pages, char *window, grant_handle_t *handles);

/* --- ring.c --- */
struct queue {
    char *ring;               /* its pages, in a row */
    uint32_t size, req_cons, rsp_prod;
    evtchn_port_t port;
    grant_handle_t handles[MAX_RING_PAGES];
    struct fifo waiting;
    unsigned active, active_writes;
    bool barrier;
    volatile bool kicked;
    uint64_t look_at;         /* look at the ring once more then; 0: no need */
};

/* Serve new rings, or (`again`) those of an earlier life. NULL, or what is wrong. */
const char *rings_attach(struct disk *disk, const struct link *link, bool again);
void rings_detach(struct disk *disk);
/* Everything of a turn: requests in, commands out, answers. */
void rings_work(struct disk *disk, uint64_t now);
/* The controller has forgotten all commands: those that were under way are made again. */
void rings_reissue(struct disk *disk);

/* --- disk.c --- */
struct disk {
    bool used, present;       /* present: seen by the scan under way */
    unsigned place;
    char path[PATH], frontend[PATH];
    domid_t frontend_id;
    bool read_only, removable, cdrom, discard;
    int state;
    volatile bool changed;
    bool offered, connected, draining, gone;
    const char *error;        /* why the frontend is served no more */
    struct nvme nvme;
    struct link link;
    struct ledger *ledger;
    struct queue queues[MAX_QUEUES];
    struct fifo issue, done;
    unsigned in_use;          /* requests */
    uint32_t writes_done, told; /* told: OWES_* that answers of the present batch say */
    struct kept kept[KEPT_SLOTS];
    unsigned kept_count;
    struct request requests[MAX_REQUESTS];
};

/* Pages that a controller reads and writes, and windows; apart from the disks, whose size is no whole page. */
struct disk_pages {
    char submission[2][PAGE_SIZE], completion[PAGE_SIZE], admin_submission[PAGE_SIZE], admin_completion[PAGE_SIZE], identify[PAGE_SIZE];
    char prps[MAX_REQUESTS][PAGE_SIZE];
    char rings[MAX_QUEUES][MAX_RING_PAGES][PAGE_SIZE];
    char registers[REGISTER_PAGES][PAGE_SIZE];
} PAGE_ALIGNED;

extern struct disk disks[MAX_DISKS];
extern struct disk_pages pages_of[MAX_DISKS];
void disks_scan(void);
void disk_work(struct disk *disk, uint64_t now);
void disk_event(const char *path, const char *token);
extern volatile bool scan_wanted;
/* The local port that an earlier life had bound to that one; 0: none. */
evtchn_port_t known_port(domid_t domid, evtchn_port_t remote);

static inline void full_barrier(void) { __asm__ volatile("mfence" ::: "memory"); }
static inline uint64_t bus_address(const void *va) { return (uint64_t)virt_to_mfn(va) << PAGE_SHIFT | ((uint64_t)va & (PAGE_SIZE - 1)); }

#endif
