"""The console ring of a domain (io/console.h)."""

from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Bytes, Layout, u32


class xencons_interface(NamedTuple):
    """The ring page. `in` is input to the guest; indexes run freely."""

    in_: Annotated[bytes, Bytes(1024)]
    out: Annotated[bytes, Bytes(2048)]
    in_cons: u32
    in_prod: u32
    out_cons: u32
    out_prod: u32


XENCONS_INTERFACE: Final = Layout(xencons_interface, c_fields={"in_": "in"})
