/* The network frontend of guests/lib/netfront.c: device/vif/0. */
#ifndef NETFRONT_H
#define NETFRONT_H

#include <guest.h>
#define xen_mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define xen_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)
#include <xen/io/netif.h>
#include <xen/io/xenbus.h>

#define NET_BUFFERS 64u /* pages each way */
#define NET_SCATTER 1u
#define NET_MULTICAST_CONTROL 2u

/* Set by the interface's event channel. */
extern volatile bool net_event;
/* Of the last transmit request that was answered: NETIF_RSP_*. */
extern int net_status;

/* Is there an interface? Learns who serves it. */
bool net_find(void);
long net_node(const char *name, char *value, size_t room);
/* A number in the back end's directory, or a negative errno. */
long net_backend_number(const char *name);
bool net_set_state(unsigned state);
bool net_wait_backend(unsigned state, uint64_t ns);
/* New rings, all receive pages given; nodes but the state are written. */
bool net_publish(unsigned features);
/* Close the channel and end the grants; the back end must have let go. */
void net_unpublish(void);
/* Put a frame into the ring (not published yet): `first` bytes in its first slot, 0 for as many as fit. False: no room. */
bool net_queue(const void *data, size_t size, unsigned flags, size_t first);
/* Publish what was queued. */
void net_flush(void);
/* Ask for a multicast group, or not any more. */
bool net_group(bool add, const uint8_t *group);
/* Wait until all that was sent is answered. */
bool net_sent(uint64_t ns);
/* A frame's size, 0 if none is there, or a negative errno. */
long net_receive(void *data, size_t room);
/* Publish what no frontend may. */
void net_break(void);

#endif
