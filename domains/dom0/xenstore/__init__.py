"""xenstored: the machine's store of names and values, with Xen's wire protocol.

`core.Core` is the daemon without I/O; `socket_server` and `ring_port` connect it to clients; `dump` keeps
its state across a restart.
"""
