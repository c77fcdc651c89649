"""Disk strings (xl-disk-configuration(5)) and network strings (xl-network-configuration(5))."""

from __future__ import annotations

import re
from typing import Any, Final

from toolstack.xlcfg.errors import ConfigError

FORMATS: Final = ("raw", "qcow", "qcow2", "vhd", "qed", "empty")
SERVED_FORMATS: Final = ("raw", "qcow2", "empty")
READ_ONLY: Final = ("r", "ro")
WRITABLE: Final = ("w", "rw", "")
FLAGS: Final = ("cdrom", "direct-io-safe", "discard", "no-discard", "trusted", "untrusted", "colo", "no-colo")
VALUED: Final = (
    *("target", "format", "vdev", "access", "devtype", "backend", "backendtype", "script", "specification"),
    *("grant_usage", "colo-host", "colo-port", "colo-export", "active-disk", "hidden-disk"),
)
BACKEND_TYPES: Final = ("phy", "tap", "qdisk", "standalone")
_PREFIX: Final = re.compile(r"([a-z][a-z0-9]*):(?![a-z0-9]*=)")
_PLAIN_PREFIXES: Final = ("tapdisk", "tap", "tap2", "aio", "ioemu", "file", "phy")
_SCRIPT_PREFIXES: Final = ("iscsi", "nbd", "enbd", "drbd")
_VDEV: Final = re.compile(r"(?:xvd|hd|sd|vd)[a-z]{1,2}[0-9]{0,2}|d[0-9]+(?:p[0-9]+)?|[0-9]+|0x[0-9a-f]+")


class _Disk:
    def __init__(self, where: str, text: str) -> None:
        self.where = where
        self.text = text
        self.fields: dict[str, Any] = {}

    def fail(self, text: str) -> ConfigError:
        return ConfigError(f"{self.where}: disk {self.text!r}: {text}")

    def set(self, key: str, value: Any) -> None:
        if self.fields.get(key) not in (None, "", value):
            raise self.fail(f"{key} is given twice: {self.fields[key]!r} and {value!r}")
        self.fields[key] = value

    def format(self, text: str) -> None:
        name = text or "raw"
        if name not in FORMATS:
            raise self.fail(f"format {text!r}: there are {', '.join(SERVED_FORMATS)}")
        if name not in SERVED_FORMATS:
            raise self.fail(f"format {name} is not served: convert it to qcow2 or raw (qemu-img convert)")
        self.set("format", name)

    def access(self, text: str) -> None:
        if text not in (*READ_ONLY, *WRITABLE):
            raise self.fail(f"access {text!r}: r, ro, w or rw")
        self.set("readonly", text in READ_ONLY)

    def vdev(self, text: str) -> None:
        """Also `hda:cdrom`, as old configurations have it."""
        name, colon, kind = text.partition(":")
        if colon:
            self.devtype(kind)
        if not _VDEV.fullmatch(name):
            raise self.fail(f"vdev {name!r}: xvda, hda, sda (and a partition), d0p1 or a number")
        self.set("vdev", name)

    def devtype(self, text: str) -> None:
        if text not in ("cdrom", "disk"):
            raise self.fail(f"devtype {text!r}: disk or cdrom")
        self.fields["cdrom"] = text == "cdrom"

    def keyed(self, key: str, value: str) -> None:
        if key == "format":
            self.format(value)
        elif key == "vdev":
            self.vdev(value)
        elif key == "access":
            self.access(value)
        elif key == "devtype":
            self.devtype(value)
        elif key == "backend":
            self.set("backend", value)
        elif key == "backendtype":
            if value not in BACKEND_TYPES:
                raise self.fail(f"backendtype {value!r}: there are {', '.join(BACKEND_TYPES)}")
        elif key == "specification":
            if value != "xen":
                raise self.fail(f"specification {value!r} is not served: leave it out (xen)")
        elif key == "grant_usage":
            if value != "1":
                raise self.fail("grant_usage=0 is not served: every backend maps grants here")
        elif key == "script":
            raise self.fail("script= is not served: a disk is a file here; give its path")
        else:
            raise self.fail(f"{key}= (COLO) is not served: leave it out")

    def flag(self, name: str) -> None:
        if name == "cdrom":
            self.fields["cdrom"] = True
        elif name in ("discard", "no-discard"):
            self.set("discard", name == "discard")
        elif name == "colo":
            raise self.fail("COLO is not served: leave it out")


def parse_disk(text: str, where: str) -> dict[str, Any]:
    """{target, format, vdev, readonly, cdrom, discard, backend}. ConfigError that names the string and the mend.

    target,format,vdev,access by position (empty places may be left out behind), key=value and flags anywhere among them; `target=`
    takes the rest of the string, commas too. Old prefixes (phy:, file:, tap:qcow2:, ...) are understood.
    """
    disk = _Disk(where, text)
    rest = text.strip()
    prefixed = False
    while not disk.fields and (match := _PREFIX.match(rest)):
        rest = rest[match.end() :]
        prefix, prefixed = match[1], True
        if prefix in FORMATS:
            disk.format(prefix)
            break
        if prefix in _SCRIPT_PREFIXES:
            raise disk.fail(f"{prefix}: is not served: a disk is a file here; give its path")
        if prefix not in _PLAIN_PREFIXES:
            raise disk.fail(f"unknown prefix {prefix}: (a path with a colon is written target=PATH)")
    positional: list[str] = []
    while rest:
        word, comma, after = rest.partition(",")
        word = word.strip(" \t\n")
        key, equals, value = word.partition("=")
        if equals and key == "target":
            disk.set("target", rest.strip(" \t\n")[len("target=") :])
            break
        if equals and re.fullmatch(r"[a-z][-_a-z0-9]*", key):
            if key not in VALUED:
                raise disk.fail(f"unknown parameter {key!r}: there are {', '.join(VALUED[:9])}")
            disk.keyed(key, value)
        elif equals:
            raise disk.fail(f"{word!r}: write target=PATH, at the end, for a path with '='")
        elif word in FLAGS:
            disk.flag(word)
        else:
            positional.append(word)
        rest = after
        if not comma:
            break
    _place(disk, positional, prefixed)
    return _finished(disk)


def _place(disk: _Disk, positional: list[str], prefixed: bool) -> None:
    """Words without a key, in their order: each goes to the first place that is still empty."""
    access_given = False
    for word in positional:
        if "target" not in disk.fields:
            disk.set("target", word)
        elif not prefixed and "format" not in disk.fields:
            if not disk.fields["target"] and ":" in word:
                disk.format("empty")
                disk.vdev(word)
            else:
                disk.format(word)
        elif "vdev" not in disk.fields:
            disk.vdev(word)
        elif not access_given:
            access_given = True
            disk.access(word)
        else:
            raise disk.fail(f"too many positional parameters, from {word!r} on")


def _finished(disk: _Disk) -> dict[str, Any]:
    fields = {
        "target": "",
        "format": "raw",
        "readonly": False,
        "cdrom": False,
        "discard": True,
        "backend": "",
        **disk.fields,
    }
    if "vdev" not in fields:
        raise disk.fail("no vdev: what the guest calls it, such as xvda, is missing")
    if fields["format"] == "empty" or (fields["cdrom"] and not fields["target"]):
        if fields["target"] or not fields["cdrom"]:
            raise disk.fail("an empty format is for a cdrom drive without a medium, and has no target")
        fields["format"] = "empty"
    elif not fields["target"]:
        raise disk.fail("no target: the path of the image is missing")
    if fields["cdrom"]:
        fields["readonly"] = True
    return fields


# ---------------------------------------------------------------------- network interfaces

_MAC: Final = re.compile(r"(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}")
_RATE: Final = re.compile(r"([0-9]+)([GMK]?)([Bb])/s(?:@([0-9]+)(ms|us|s)?)?")
VIF_KEYS: Final = (
    *("mac", "bridge", "gatewaydev", "netdev", "type", "model", "vifname", "script", "ip", "backend", "rate"),
    *("devid", "mtu", "accel", "trusted"),
)
HOST_ONLY: Final = ("gatewaydev", "netdev", "vifname", "script", "accel")
"""They steer the scripts of a real dom0."""


def parse_vif(text: str, where: str) -> dict[str, Any]:
    """{mac, bridge, model, type, ip, backend, rate, devid, mtu, trusted}, those that are given. ConfigError."""
    fields: dict[str, Any] = {}

    def fail(problem: str) -> ConfigError:
        return ConfigError(f"{where}: vif {text!r}: {problem}")

    for word in text.split(","):
        word = word.strip()
        if not word:
            continue
        key, equals, value = word.partition("=")
        key, value = key.strip(), value.strip()
        if key in ("trusted", "untrusted") and not equals:
            fields["trusted"] = key == "trusted"
            continue
        if not equals or key not in VIF_KEYS:
            raise fail(f"unknown parameter {key!r}: there are {', '.join(VIF_KEYS)}")
        if key in fields:
            raise fail(f"{key} is given twice")
        fields[key] = _vif_value(key, value, fail)
    return {key: value for key, value in fields.items() if key not in HOST_ONLY}


def _vif_value(key: str, value: str, fail: Any) -> Any:
    if key == "mac":
        if not _MAC.fullmatch(value):
            raise fail(f"mac {value!r}: six pairs of hexadecimal digits, as 00:16:3e:12:34:56")
        if int(value[:2], 16) & 1:
            raise fail(f"mac {value!r}: a multicast address: make the first byte even")
        return value.lower()
    if key == "type":
        if value not in ("ioemu", "vif"):
            raise fail(f"type {value!r}: ioemu or vif")
    elif key == "rate":
        if not _RATE.fullmatch(value):
            raise fail(f"rate {value!r}: such as 10Mb/s, 250KB/s or 1MB/s@20ms")
    elif key in ("devid", "mtu"):
        low, high = (0, 255) if key == "devid" else (68, 65535)
        if not re.fullmatch(r"[0-9]{1,9}", value) or not low <= int(value) <= high:
            raise fail(f"{key} {value!r}: a number from {low} to {high}")
        return int(value)
    elif key in ("accel", "trusted"):
        return value not in ("0", "no", "false")
    return value
