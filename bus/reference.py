"""`python -m bus.reference > docs/bus.md`: the messages of the bus, from their models."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator

from bus.messages import control, device, domain, envelope, warden
from bus.messages import model as device_model
from bus.messages.envelope import Message, Registry

LINKS: tuple[tuple[str, str, Registry], ...] = (
    (
        "A domain's process to the hypervisor",
        "ZMTP 3.1 with CURVE, one endpoint a domain",
        device.FROM_ANY_DOMAIN,
    ),
    ("The hypervisor to a domain's process", "the same connection", domain.TO_DOMAIN),
    (
        "The hypervisor to a domain's process, descriptors",
        "SOCK_SEQPACKET pair, file descriptors by SCM_RIGHTS",
        domain.DESCRIPTORS,
    ),
    ("A device process to the hypervisor", "ZMTP 3.1 with CURVE, one endpoint a device", device.FROM_DEVICE),
    ("The hypervisor to a device process", "the same connection", device.TO_DEVICE),
    ("The hypervisor to the warden", "SOCK_SEQPACKET pair", warden.TO_WARDEN),
    ("The warden to the hypervisor", "the same pair", warden.FROM_WARDEN),
    ("The warden to a process it starts", "SOCK_SEQPACKET pair, inherited", warden.TO_PROCESS),
    ("Dom0 to the warden", "SOCK_SEQPACKET pair (descriptor `warden` of its `begin`)", warden.FROM_DOM0),
    ("The warden to Dom0", "the same pair", warden.TO_DOM0),
    (
        "An agent (the warden of one container) to the machine's warden",
        "SOCK_SEQPACKET socket that this agent's gid alone can reach",
        warden.FROM_AGENT,
    ),
    ("The machine's warden to an agent", "the same connection", warden.TO_AGENT),
    (
        "An operator to the machine's warden",
        "SOCK_SEQPACKET socket, for operators' gid alone",
        warden.FROM_OPERATOR,
    ),
    ("The machine's warden to an operator", "the same connection", warden.TO_OPERATOR),
    (
        "Dom0's toolstack to a device model",
        "SOCK_SEQPACKET pair, deposited with the warden",
        device_model.TO_MODEL,
    ),
    ("A device model to Dom0's toolstack", "the same pair", device_model.FROM_MODEL),
    (
        "The command to Dom0's toolstack",
        "SOCK_SEQPACKET socket of the machine, for its owner alone",
        control.TO_TOOLSTACK,
    ),
    ("Dom0's toolstack to the command", "the same connection", control.FROM_TOOLSTACK),
)


def _type(annotation: object) -> str:
    """A field's type in words."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return " or ".join(repr(value) for value in typing.get_args(annotation))
    if origin is not None:
        inner = ", ".join(_type(argument) for argument in typing.get_args(annotation))
        return f"{getattr(origin, '__name__', str(origin))}[{inner}]"
    return getattr(annotation, "__name__", str(annotation)).replace("NoneType", "none")


def _limits(metadata: list[object]) -> str:
    """Bounds of a field, as its model has them."""
    words: list[str] = []
    for item in metadata:
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<")):
            if (value := getattr(item, name, None)) is not None:
                words.append(
                    f"{sign} {value:#x}" if isinstance(value, int) and value > 9999 else f"{sign} {value}"
                )
        if (value := getattr(item, "max_length", None)) is not None:
            words.append(f"at most {value} long")
        if (value := getattr(item, "min_length", None)) is not None:
            words.append(f"at least {value} long")
        if (value := getattr(item, "pattern", None)) is not None:
            words.append(f"`{value}`")
    return ", ".join(words)


def _message(kind: str, model: type[Message]) -> Iterator[str]:
    yield f"### `{kind}`"
    yield ""
    yield inspect.cleandoc(model.__doc__ or "")
    yield ""
    if model.model_fields:
        yield "| field | type | bounds |"
        yield "| --- | --- | --- |"
        for name, field in model.model_fields.items():
            bounds = _limits(field.metadata).replace("|", "\\|")
            optional = "" if field.is_required() else " (optional)"
            yield f"| `{name}`{optional} | {_type(field.annotation)} | {bounds} |"
        yield ""


def reference() -> str:
    """The page."""
    lines = [
        "# The bus",
        "",
        "Made by `python -m bus.reference` from the models in `bus/messages/`; do not edit.",
        "",
        f"Every message is msgpack of `[version, kind, fields]`; the version is {envelope.VERSION}. It is at most",
        f"{envelope.MAX_MESSAGE} bytes long, carries at most {envelope.MAX_DATA} bytes of structures, and no list or map in it has more",
        f"than {envelope.MAX_ITEMS} elements. It is validated once, by the model of its kind, when it arrives. What does not validate is",
        "refused with a reason (`refused`) and counted, and the sender goes on. Who sent it is known by the connection it came on (a CURVE",
        "key that only that process was given, on a socket that only its uid can reach), never by a field.",
        "",
        "Payload is not in messages: see [decision 0004](decisions/0004-devices.md) for DMA, and [architecture.md](architecture.md) section 4 for grants. Hypercalls travel in the wire form of",
        "their entry in `bus/abi/hypercalls.py` ([abi.md](abi.md)). Orders of the hypervisor to a domain's process are listed in",
        "`hypervisor/core/orders.py` and `hypervisor/core/grants.py`.",
        "",
    ]
    for title, transport, kinds in LINKS:
        lines += [f"## {title}", "", f"Transport: {transport}.", ""]
        for kind, model in kinds.items():
            lines += _message(kind, model)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(reference(), end="")
