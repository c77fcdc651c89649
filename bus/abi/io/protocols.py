"""Values of the "protocol" key by which a frontend names its structure layout (io/protocols.h)."""

from __future__ import annotations

from typing import Final

XEN_IO_PROTO_ABI_X86_32: Final = "x86_32-abi"
XEN_IO_PROTO_ABI_X86_64: Final = "x86_64-abi"
XEN_IO_PROTO_ABI_ARM: Final = "arm-abi"
XEN_IO_PROTO_ABI_NATIVE: Final = "x86_64-abi"
