"""Xenstore's wire protocol and its ring (io/xs_wire.h)."""

from typing import Annotated, Final, NamedTuple

from bus.abi.layout import Bytes, Layout, u32

XS_WRITE_NONE: Final = "NONE"
XS_WRITE_CREATE: Final = "CREATE"
XS_WRITE_CREATE_EXCL: Final = "CREATE|EXCL"

XENSTORE_RING_SIZE: Final = 1024
XENSTORE_PAYLOAD_MAX: Final = 0x1000
XENSTORE_ABS_PATH_MAX: Final = 3072
XENSTORE_REL_PATH_MAX: Final = 2048
XENSTORE_SERVER_FEATURE_RECONNECTION: Final = 1
XENSTORE_SERVER_FEATURE_ERROR: Final = 2
XENSTORE_CONNECTED: Final = 0
XENSTORE_RECONNECT: Final = 1
XENSTORE_ERROR_NONE: Final = 0
XENSTORE_ERROR_COMM: Final = 1
XENSTORE_ERROR_RINGIDX: Final = 2
XENSTORE_ERROR_PROTO: Final = 3

XS_CONTROL: Final = 0
XS_DIRECTORY: Final = 1
XS_READ: Final = 2
XS_GET_PERMS: Final = 3
XS_WATCH: Final = 4
XS_UNWATCH: Final = 5
XS_TRANSACTION_START: Final = 6
XS_TRANSACTION_END: Final = 7
XS_INTRODUCE: Final = 8
XS_RELEASE: Final = 9
XS_GET_DOMAIN_PATH: Final = 10
XS_WRITE: Final = 11
XS_MKDIR: Final = 12
XS_RM: Final = 13
XS_SET_PERMS: Final = 14
XS_WATCH_EVENT: Final = 15
XS_ERROR: Final = 16
XS_IS_DOMAIN_INTRODUCED: Final = 17
XS_RESUME: Final = 18
XS_SET_TARGET: Final = 19
XS_RESET_WATCHES: Final = 21
XS_DIRECTORY_PART: Final = 22
XS_TYPE_COUNT: Final = 23
XS_INVALID: Final = 65535
XS_WATCH_PATH: Final = 0
XS_WATCH_TOKEN: Final = 1


class xsd_sockmsg(NamedTuple):
    """Header of every message; `len` bytes follow, at most XENSTORE_PAYLOAD_MAX."""

    type: u32
    req_id: u32
    tx_id: u32
    len: u32


XSD_SOCKMSG: Final = Layout(xsd_sockmsg)


class xenstore_domain_interface(NamedTuple):
    """The ring page. Indexes run freely; the guest writes req_prod and rsp_cons, xenstored the others."""

    req: Annotated[bytes, Bytes(1024)]
    rsp: Annotated[bytes, Bytes(1024)]
    req_cons: u32
    req_prod: u32
    rsp_cons: u32
    rsp_prod: u32
    server_features: u32
    connection: u32
    error: u32


XENSTORE_DOMAIN_INTERFACE: Final = Layout(xenstore_domain_interface)


XSD_ERRORS: Final = (
    "EINVAL",
    "EACCES",
    "EEXIST",
    "EISDIR",
    "ENOENT",
    "ENOMEM",
    "ENOSPC",
    "EIO",
    "ENOTEMPTY",
    "ENOSYS",
    "EROFS",
    "EBUSY",
    "EAGAIN",
    "EISCONN",
    "E2BIG",
    "EPERM",
)
"""The words that an XS_ERROR reply may carry: `xsd_errors` of the header."""
