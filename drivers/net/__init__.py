"""Split network driver (io/netif.h): both ends of the rings, and the software switch behind back ends. No I/O."""
