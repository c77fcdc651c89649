"""Network devices: transmit and receive rings, extra info, the control ring (io/netif.h)."""

from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Array, Bytes, Layout, Union, i16, u8, u16, u32

XEN_NETIF_NR_SLOTS_MIN: Final = 18
XEN_NETIF_CTRL_HASH_TYPE_IPV4: Final = 1
XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP: Final = 2
XEN_NETIF_CTRL_HASH_TYPE_IPV6: Final = 4
XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP: Final = 8
XEN_NETIF_CTRL_HASH_ALGORITHM_NONE: Final = 0
XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ: Final = 1
XEN_NETIF_CTRL_TYPE_INVALID: Final = 0
XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS: Final = 1
XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS: Final = 2
XEN_NETIF_CTRL_TYPE_SET_HASH_KEY: Final = 3
XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE: Final = 4
XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE: Final = 5
XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING: Final = 6
XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM: Final = 7
XEN_NETIF_CTRL_TYPE_GET_GREF_MAPPING_SIZE: Final = 8
XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING: Final = 9
XEN_NETIF_CTRL_TYPE_DEL_GREF_MAPPING: Final = 10
XEN_NETIF_CTRL_STATUS_SUCCESS: Final = 0
XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED: Final = 1
XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER: Final = 2
XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW: Final = 3
XEN_NETIF_CTRLF_GREF_readonly: Final = 1

NETTXF_csum_blank: Final = 1
NETTXF_data_validated: Final = 2
NETTXF_more_data: Final = 4
NETTXF_extra_info: Final = 8

XEN_NETIF_MAX_TX_SIZE: Final = 0xFFFF
XEN_NETIF_EXTRA_TYPE_NONE: Final = 0
XEN_NETIF_EXTRA_TYPE_GSO: Final = 1
XEN_NETIF_EXTRA_TYPE_MCAST_ADD: Final = 2
XEN_NETIF_EXTRA_TYPE_MCAST_DEL: Final = 3
XEN_NETIF_EXTRA_TYPE_HASH: Final = 4
XEN_NETIF_EXTRA_TYPE_MAX: Final = 5
XEN_NETIF_EXTRA_FLAG_MORE: Final = 1
XEN_NETIF_GSO_TYPE_NONE: Final = 0
XEN_NETIF_GSO_TYPE_TCPV4: Final = 1
XEN_NETIF_GSO_TYPE_TCPV6: Final = 2

NETRXF_data_validated: Final = 1
NETRXF_csum_blank: Final = 2
NETRXF_more_data: Final = 4
NETRXF_extra_info: Final = 8
NETRXF_gso_prefix: Final = 16

NETIF_RSP_DROPPED: Final = -2
NETIF_RSP_ERROR: Final = -1
NETIF_RSP_OKAY: Final = 0
NETIF_RSP_NULL: Final = 1


class netif_tx_request(NamedTuple):
    """flags: NETTXF_*. size: of the whole packet in the first slot, of the fragment in the others."""

    gref: u32
    offset: u16
    flags: u16
    id: u16
    size: u16


NETIF_TX_REQUEST: Final = Layout(netif_tx_request)


class netif_extra_info_gso(NamedTuple):
    size: u16
    type: u8
    pad: u8
    features: u16


NETIF_EXTRA_INFO_GSO: Final = Layout(
    netif_extra_info_gso, c="__typeof__(((struct netif_extra_info *)0)->u.gso)"
)


class netif_extra_info_mcast(NamedTuple):
    addr: Annotated[bytes, Bytes(6)]


NETIF_EXTRA_INFO_MCAST: Final = Layout(
    netif_extra_info_mcast, c="__typeof__(((struct netif_extra_info *)0)->u.mcast)"
)


class netif_extra_info_hash(NamedTuple):
    type: u8
    algorithm: u8
    value: Annotated[bytes, Bytes(4)]


NETIF_EXTRA_INFO_HASH: Final = Layout(
    netif_extra_info_hash, c="__typeof__(((struct netif_extra_info *)0)->u.hash)"
)


class netif_extra_info(NamedTuple):
    """In the slot behind a first request or response with the extra_info flag. flags:
    XEN_NETIF_EXTRA_FLAG_MORE."""

    type: u8
    flags: u8
    u: Annotated[
        bytes,
        Union(
            gso=netif_extra_info_gso,
            mcast=netif_extra_info_mcast,
            hash=netif_extra_info_hash,
            pad=Annotated[tuple[int, ...], Array(u16, 3)],
        ),
    ]


NETIF_EXTRA_INFO: Final = Layout(netif_extra_info)


class netif_tx_response(NamedTuple):
    """status: NETIF_RSP_*."""

    id: u16
    status: i16


NETIF_TX_RESPONSE: Final = Layout(netif_tx_response)


class netif_rx_request(NamedTuple):
    """A page for the backend to write into."""

    id: u16
    pad: u16
    gref: u32


NETIF_RX_REQUEST: Final = Layout(netif_rx_request)


class netif_rx_response(NamedTuple):
    """flags: NETRXF_*. status: bytes received, or NETIF_RSP_*."""

    id: u16
    offset: u16
    flags: u16
    status: i16


NETIF_RX_RESPONSE: Final = Layout(netif_rx_response)


class xen_netif_ctrl_request(NamedTuple):
    id: u16
    type: u16
    data: Annotated[tuple[int, ...], Array(u32, 3)]


XEN_NETIF_CTRL_REQUEST: Final = Layout(xen_netif_ctrl_request)


class xen_netif_ctrl_response(NamedTuple):
    id: u16
    type: u16
    status: u32
    data: u32


XEN_NETIF_CTRL_RESPONSE: Final = Layout(xen_netif_ctrl_response)


class xen_netif_gref(NamedTuple):
    ref: u32
    flags: u16
    status: u16


XEN_NETIF_GREF: Final = Layout(xen_netif_gref)
