"""PCI addresses, what pci= says (xl-pci-configuration(5)), and devices that the machine is to have."""

from __future__ import annotations

import re
from typing import Any, Final

from toolstack.xlcfg.errors import ConfigError

BDF: Final = re.compile(r"(?:([0-9a-fA-F]{1,4}):)?([0-9a-fA-F]{1,2}):([01]?[0-9a-fA-F])\.([0-7])")
OPTIONS: Final = ("msitranslate", "power_mgmt", "permissive", "seize", "rdm_policy", "name")
"""They steer what the devices here do not have (pciback, RMRRs): taken, and without effect."""
FORMATS: Final = ("raw", "qcow2")


def parse_bdf(text: str, where: str) -> int:
    """bus << 8 | device << 3 | function. ConfigError."""
    found = BDF.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{where}: {text!r}: a PCI address is BUS:DEVICE.FUNCTION, such as 01:00.0")
    segment, bus, device, function = (int(word or "0", 16) for word in found.groups())
    if segment:
        raise ConfigError(f"{where}: {text!r}: this machine has PCI segment 0 only")
    return bus << 8 | device << 3 | function


def parse_pci(text: str, where: str) -> int:
    """One entry of pci=: its address. ConfigError."""
    address, *options = (word.strip() for word in text.split(","))
    for option in options:
        key, equals, value = option.partition("=")
        if key == "bdf" and equals and not address:
            address = value
        elif key not in OPTIONS:
            raise ConfigError(
                f"{where}: pci {text!r}: unknown parameter {option!r}: there are {', '.join(OPTIONS)}"
            )
    address = address.removeprefix("bdf=")
    place, at, _ = address.partition("@")
    if at:
        raise ConfigError(
            f"{where}: pci {text!r}: the slot in the guest cannot be chosen: leave out @ and what follows"
        )
    return parse_bdf(place, f"{where}: pci")


def parse_nvme(text: str, where: str) -> dict[str, Any]:
    """FILE[,raw|qcow2][,r|w][,bdf=ADDRESS]: {target, format, readonly, bdf (or None)}. ConfigError."""
    target, *words = (word.strip() for word in text.split(","))
    device: dict[str, Any] = {"target": target, "format": "raw", "readonly": False, "bdf": None}
    if not target:
        raise ConfigError(f"{where}: {text!r}: it needs a file")
    for word in words:
        if word in FORMATS:
            device["format"] = word
        elif word in ("r", "ro", "w", "rw"):
            device["readonly"] = word in ("r", "ro")
        elif word.startswith("bdf="):
            device["bdf"] = parse_bdf(word[4:], where)
        else:
            raise ConfigError(f"{where}: {text!r}: {word!r} is not known: raw or qcow2, r or w, bdf=ADDRESS")
    return device
