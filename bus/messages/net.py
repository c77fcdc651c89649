"""The link between Dom0's toolstack and NetIO, beside the hypervisor: ports of bridges for programs outside, and links with faults.

NetIO's end is deposited with the warden, so that a process that takes the place of another has the same one. It says hello, and Dom0 tells
it all that holds; a port's socket stays the same over that. Dom0 believes nothing of NetIO but which ports are gone.
"""

from typing import Annotated, ClassVar

from pydantic import Field

from bus.messages.domain import U32
from bus.messages.envelope import Message, registry

MAX_PORTS = 32
"""Of programs outside, on all bridges together."""
MAX_FRAME = 1 << 16
"""Bytes of a frame on such a port's socket (SOCK_SEQPACKET, one frame a packet)."""
BridgeName = Annotated[str, Field(min_length=1, max_length=15, pattern=r"^[A-Za-z0-9_.-]+$")]
"""As a network device of Linux may be called."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(ge=0, le=60_000, allow_inf_nan=False)]


class NetPort(Message):
    """A port for a program outside: its socket comes along."""

    KIND: ClassVar[str] = "net_port"
    port: U32
    bridge: BridgeName
    mirror: bool = False
    """All that passes the bridge goes there too."""


class NetLink(Message):
    """What happens to frames on their way from a bridge to its ports (drivers.net.switch.Link), from now on."""

    KIND: ClassVar[str] = "net_link"
    bridge: BridgeName
    port: Annotated[str, Field(max_length=64)] = ""
    """Its name; none: all ports, also those to come."""
    loss: Share = 0.0
    duplicate: Share = 0.0
    reorder: Share = 0.0
    corrupt: Share = 0.0
    delay_ms: Milliseconds = 0.0
    jitter_ms: Milliseconds = 0.0
    up: bool = True
    seed: U32 | None = None
    """Begin the bridge's luck anew with that."""


class NetHost(Message):
    """A helper host on a bridge (drivers.net.helper.HelperHost), or none any more."""

    KIND: ClassVar[str] = "net_host"
    bridge: BridgeName
    address: Annotated[str, Field(max_length=32, pattern=r"^[0-9./]*$")]
    """Its own, and the length of the network's prefix; empty: it goes."""
    dhcp: bool = True


class NetHello(Message):
    """A process is up, and knows nothing yet."""

    KIND: ClassVar[str] = "net_hello"


class NetPortGone(Message):
    """The program at that port closed its end."""

    KIND: ClassVar[str] = "net_port_gone"
    port: U32


TO_NETIO = registry(NetPort, NetLink, NetHost)
FROM_NETIO = registry(NetHello, NetPortGone)
