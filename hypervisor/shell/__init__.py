"""The process side of the hypervisor: sockets, memfds and time around `hypervisor.core`."""
