"""From the text of an xl.cfg to what a domain is to be."""

from __future__ import annotations

import difflib
import re
import time
import uuid as uuid_module
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toolstack.xlcfg.cpus import parse_cpus
from toolstack.xlcfg.devices import parse_disk, parse_vif
from toolstack.xlcfg.errors import ConfigError
from toolstack.xlcfg.grammar import Setting, Value, parse
from toolstack.xlcfg.keys import IGNORED, REFUSED, SHIM_CMDLINE, SHIM_KEYS, UNDERSTOOD
from toolstack.xlcfg.pci import parse_pci
from toolstack.xlcfg.vnc import HVM_VNC_KEYS, Vnc, parse_vnc

Action = Literal[
    "destroy", "restart", "rename-restart", "preserve", "coredump-destroy", "coredump-restart", "soft-reset"
]
MAX_TIME_OFFSET_S: Final = 100_000_000_000
"""Three thousand years: what a clock of seconds and years of four digits can show."""
Parsed = TypeVar("Parsed")
MAX_FILE: Final = 1 << 20
HVM_KEYS: Final = ("boot", "serial", "vga", "firmware_override", "bios_path_override")


class XlConfig(BaseModel):
    """A configuration that holds together. Units are xl's: MiB, percent of one processor."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.+-]+$")
    type: Literal["pv", "pvh", "hvm"] = "pv"
    kernel: str = ""
    ramdisk: str = ""
    cmdline: str = Field(default="", max_length=4095)
    memory: int = Field(default=32, ge=1, le=1 << 20)
    maxmem: int = Field(default=0, ge=0, le=1 << 20)
    vcpus: int = Field(default=1, ge=1, le=128)
    maxvcpus: int = Field(default=0, ge=0, le=128)
    cpu_weight: int = Field(default=256, ge=1, le=65535)
    cap: int = Field(default=0, ge=0, le=65535)
    on_poweroff: Action = "destroy"
    on_reboot: Action = "restart"
    on_watchdog: Action = "destroy"
    on_crash: Action = "destroy"
    on_soft_reset: Action = "soft-reset"
    uuid: bytes = Field(min_length=16, max_length=16)
    disks: list[dict[str, Any]] = Field(default=[], max_length=64)
    pci: list[int] = Field(default=[], max_length=16)
    """PCI addresses of devices of its own: bus << 8 | device << 3 | function."""
    vifs: list[dict[str, Any]] = Field(default=[], max_length=16)
    cpus: list[set[int] | None] = Field(default=[], max_length=128)
    """Processors that each vCPU may use; None: all. One entry for all vCPUs, or one each."""
    boot: str = ""
    serial: list[str] = Field(default=[], max_length=4)
    serial_by_default: bool = True
    """No `serial=` in the file: an HVM guest has a serial line all the same, and it is its first console."""
    vga: Literal["stdvga", "none"] = "stdvga"
    firmware_path: str = ""
    """Of an HVM guest; "": Debian's SeaBIOS. An ELF program takes the place of hvmloader and BIOS."""
    bios_path: str = ""
    """What such a program is given as BIOS; "": Debian's SeaBIOS."""
    pvshim: bool = False
    """Of a PVH guest: `kernel` is a PV kernel, which runs in Xen's shim."""
    shim_path: str = ""
    """"": Debian's."""
    shim_cmdline: str = Field(default="", max_length=4095)
    """"": libxl's."""
    vnc: Vnc | None = None
    hap: bool = True
    time_offset: int = 0
    """Seconds: `rtc_timeoffset`, and the time zone's with `localtime`."""
    warnings: list[str] = []

    def domain_fields(self) -> dict[str, Any]:
        """The fields of `bus.messages.control.DomainConfig`, kernel and ramdisk as paths."""
        same = (
            "name",
            "type",
            "kernel",
            "ramdisk",
            "cmdline",
            "vcpus",
            "maxvcpus",
            "cpu_weight",
            "cap",
            "uuid",
            "time_offset",
        )
        actions = ("on_poweroff", "on_reboot", "on_watchdog", "on_crash", "on_soft_reset")
        fields = {name: getattr(self, name) for name in (*same, *actions, "disks", "vifs", "pci")}
        if self.type != "pv":
            fields["hap"] = self.hap
        if self.type == "hvm":
            fields |= {
                "serial": bool(self.serial) or self.serial_by_default,
                "vga": self.vga,
                "firmware_path": self.firmware_path,
                "bios_path": self.bios_path,
                "boot": self.boot,
            }
            if self.vnc is not None:
                fields |= self.vnc.domain_fields()
        if self.pvshim:
            fields |= {"pvshim": True, "shim_path": self.shim_path, "shim_cmdline": self.shim_cmdline}
        cpus = [None if entry is None else sorted(entry) for entry in self.cpus]
        return {**fields, "cpus": cpus, "memory_mb": self.memory, "maxmem_mb": self.maxmem}


def load(path: str, more: list[str] | None = None) -> XlConfig:
    """Read and understand a file; `more` are lines as if at its end. ConfigError."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if len(raw) > MAX_FILE:
        raise ConfigError(f"longer than {MAX_FILE} bytes: this is no configuration", path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError("not UTF-8 text (is it the kernel?)", path, line, 1) from None
    base = Path(path).parent
    settings = parse(text, path)
    for extra in more or []:
        settings.update(parse(_quoted(extra), repr(extra)))
    return understand(settings, path, base)


def _quoted(text: str) -> str:
    """On a command line the shell has eaten the quotes: `name=x` means name="x"."""
    key, equals, value = text.partition("=")
    value = value.strip()
    if equals and value and value[0] not in "'\"[0123456789":
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'{key}="{escaped}"'
    return text


class _Reader:
    """Settings with their positions, taken one by one."""

    def __init__(self, settings: dict[str, Setting], source: str) -> None:
        self.settings = settings
        self.source = source

    def fail(self, key: str, text: str, at: Value | None = None) -> ConfigError:
        setting = self.settings.get(key)
        if setting is None:
            return ConfigError(text, self.source)
        place = at or setting.value
        return ConfigError(f"{key}: {text}", self.source, place.line, place.column)

    def string(self, key: str, default: str = "") -> str:
        setting = self.settings.get(key)
        if setting is None:
            return default
        if not isinstance(setting.value.data, str):
            raise self.fail(key, f"must be a string in quotes, not {setting.value.kind}")
        return setting.value.data

    def number(self, key: str, default: int) -> int:
        setting = self.settings.get(key)
        if setting is None:
            return default
        data = setting.value.data
        if isinstance(data, str) and data.isascii() and data.isdigit() and len(data) < 19:
            return int(data)  # xl takes memory="512" as well
        if not isinstance(data, int):
            raise self.fail(key, f"must be a number, not {setting.value.kind}")
        return data

    def strings(self, key: str) -> list[tuple[str, Value]]:
        """A list of strings; a lone string is a list of one."""
        setting = self.settings.get(key)
        if setting is None:
            return []
        value = setting.value
        items = value.data if isinstance(value.data, list) else [value]
        found = []
        for item in items:
            if not isinstance(item.data, str):
                raise self.fail(key, f"must be a list of strings, and this is {item.kind}", item)
            found.append((item.data, item))
        return found


def understand(settings: dict[str, Setting], source: str, base: Path = Path()) -> XlConfig:
    """What the settings mean; files are looked for beside the configuration. ConfigError."""
    warnings = _known_keys(settings, source)
    read = _Reader(settings, source)
    if "name" not in settings:
        raise ConfigError('name is missing: add name = "..."', source)
    values: dict[str, Any] = {
        "name": read.string("name"),
        "type": _type(read),
        "kernel": _path(read.string("kernel"), base),
        "ramdisk": _path(read.string("ramdisk"), base),
        "cmdline": _cmdline(read),
        "uuid": _uuid(read),
        "disks": [_device(read, "disk", text, at, parse_disk) for text, at in read.strings("disk")],
        "vifs": [_device(read, "vif", text, at, parse_vif) for text, at in read.strings("vif")],
        "pci": [_device(read, "pci", text, at, parse_pci) for text, at in read.strings("pci")],
        "boot": _boot(read),
        "vga": _vga(read),
        "vnc": _vnc(read),
        "hap": _hap(read),
        "time_offset": _time_offset(read),
        "serial_by_default": "serial" not in settings and "firmware_override" not in settings,
        "firmware_path": _path(read.string("firmware_override") or read.string("bios_path_override"), base),
        "bios_path": _path(read.string("bios_path_override"), base),
        "serial": [text for text, _ in read.strings("serial")],
        "cpus": _cpus(read),
        **_shim(read, base),
    }
    for disk in values["disks"]:
        if disk["backend"] in ("", "DomIO"):  # else it is a path of that domain's
            disk["target"] = _path(disk["target"], base)
    names = [disk["vdev"] for disk in values["disks"]]
    for name in names:
        if names.count(name) > 1:
            raise read.fail("disk", f"two disks are called {name}: give each a vdev of its own")
    for key, default in (
        ("memory", 32),
        ("vcpus", 1),
        ("cpu_weight", 256),
        ("maxmem", 0),
        ("maxvcpus", 0),
        ("cap", 0),
    ):
        values[key] = read.number(key, default)
    if "vcpus" not in settings and values["maxvcpus"]:
        values["vcpus"] = values["maxvcpus"]
    for key in ("on_poweroff", "on_reboot", "on_watchdog", "on_crash", "on_soft_reset"):
        if key in settings:
            values[key] = read.string(key)
    if values["maxmem"] and values["maxmem"] < values["memory"]:
        raise read.fail("maxmem", f"{values['maxmem']} is less than memory = {values['memory']}")
    if values["maxvcpus"] and values["maxvcpus"] < values["vcpus"]:
        raise read.fail("maxvcpus", f"{values['maxvcpus']} is less than vcpus = {values['vcpus']}")
    if values["type"] != "hvm" and not values["kernel"]:
        raise ConfigError(f'kernel is missing: a {values["type"]} guest needs kernel = "PATH"', source)
    if "cpus" in settings and not isinstance(settings["cpus"].value.data, list):
        values["cpus"] *= (
            values["maxvcpus"] or values["vcpus"]
        )  # a string is for all vCPUs, a list for one after the other
    if values["type"] == "pv" and "hap" in settings:
        warnings.append(f"{source}: hap: only for HVM and PVH guests")
    if values["type"] == "hvm":
        if values["ramdisk"] and not values["kernel"]:
            raise read.fail("ramdisk", "only with kernel=")
    else:
        warnings += [
            f"{source}: {key}: only for HVM guests" for key in (*HVM_KEYS, *HVM_VNC_KEYS) if key in settings
        ]
    if values["type"] != "pvh":
        warnings += [f"{source}: {key}: only for PVH guests" for key in SHIM_KEYS if key in settings]
        values["pvshim"] = False
    try:
        return XlConfig(**values, warnings=warnings)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = {"disks": "disk", "vifs": "vif"}.get(str(first["loc"][0]), str(first["loc"][0]))
        raise read.fail(key, first["msg"]) from None


def _known_keys(settings: dict[str, Setting], source: str) -> list[str]:
    warnings = []
    for key, setting in settings.items():
        if key in UNDERSTOOD:
            continue
        place = f"{source}:{setting.line}:{setting.column}"
        if key in REFUSED:
            if setting.value.data in (0, "", "0", []):
                continue
            raise ConfigError(f"{key}: {REFUSED[key]}", source, setting.line, setting.column)
        if key in IGNORED:
            warnings.append(f"{place}: {key} is ignored: {IGNORED[key]}")
            continue
        near = difflib.get_close_matches(key, [*UNDERSTOOD, *IGNORED, *REFUSED], n=1)
        hint = f": do you mean {near[0]}?" if near else ": see xl.cfg(5)"
        raise ConfigError(f"{key[:60]}: there is no such key{hint}", source, setting.line, setting.column)
    return warnings


def _type(read: _Reader) -> str:
    if "type" in read.settings:
        kind = read.string("type")
        if kind not in ("pv", "pvh", "hvm"):
            raise read.fail("type", f"{kind!r}: there are pv, pvh and hvm")
        return kind
    builder = read.string("builder", "generic")
    kinds = {"generic": "pv", "linux": "pv", "hvm": "hvm"}
    if builder not in kinds:
        raise read.fail("builder", f'{builder!r}: write type = "pv", "pvh" or "hvm" instead')
    return kinds[builder]


def _boot(read: _Reader) -> str:
    """Letters of xl.cfg's `boot=`: c disk, d optical drive; a and n are taken, and there is nothing there to boot from."""
    order = read.string("boot", "cd")
    if not re.fullmatch(r"[acdn]{0,4}", order):
        raise read.fail("boot", f"{order!r}: letters of c (disk), d (optical drive), a (floppy), n (network)")
    return order


def _vga(read: _Reader) -> str:
    """The graphics card of an HVM guest."""
    kind = read.string("vga", "stdvga")
    if kind not in ("stdvga", "none"):
        raise read.fail("vga", f"{kind!r}: there are stdvga and none")
    return kind


def _shim(read: _Reader, base: Path) -> dict[str, Any]:
    """xl.cfg's pvshim keys: pvshim_extra comes behind the shim's own command line."""
    if read.number("pvshim", 0) not in (0, 1):
        raise read.fail("pvshim", "must be 0 or 1")
    words = (read.string("pvshim_cmdline", SHIM_CMDLINE), read.string("pvshim_extra"))
    return {
        "pvshim": bool(read.number("pvshim", 0)),
        "shim_path": _path(read.string("pvshim_path"), base),
        "shim_cmdline": " ".join(word for word in words if word),
    }


def _time_offset(read: _Reader) -> int:
    """Seconds; negative ones are given in quotes, as the grammar has no sign."""
    setting = read.settings.get("rtc_timeoffset")
    data = setting.value.data if setting is not None else 0
    if isinstance(data, str) and re.fullmatch(r"-?[0-9]{1,12}", data):
        data = int(data)
    if not isinstance(data, int) or abs(data) > MAX_TIME_OFFSET_S:
        raise read.fail("rtc_timeoffset", f"must be a number of seconds, at most {MAX_TIME_OFFSET_S}")
    return data + (time.localtime().tm_gmtoff if read.number("localtime", 0) else 0)


def _hap(read: _Reader) -> bool:
    """Two-level paging, or shadow page tables."""
    value = read.number("hap", 1)
    if value not in (0, 1):
        raise read.fail("hap", "must be 0 (shadow page tables) or 1")
    return bool(value)


def _vnc(read: _Reader) -> Vnc | None:
    """The VNC server of an HVM guest; None: none is wanted."""
    texts: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for key in HVM_VNC_KEYS:
        if key in read.settings and key in ("vnclisten", "vncpasswd"):
            texts[key] = read.string(key)
        elif key in read.settings:
            numbers[key] = read.number(key, 0)
    try:
        return parse_vnc(texts, numbers)
    except ConfigError as error:
        key, _, text = error.text.partition(": ")
        raise read.fail(key, text) from None


def _cmdline(read: _Reader) -> str:
    if "cmdline" in read.settings:
        return read.string("cmdline")
    words = [f"root={read.string('root')}" if "root" in read.settings else "", read.string("extra")]
    return " ".join(word for word in words if word)


def _uuid(read: _Reader) -> bytes:
    if "uuid" not in read.settings:
        return uuid_module.uuid4().bytes
    text = read.string("uuid")
    if not re.fullmatch(r"[0-9A-Fa-f]{8}(-?[0-9A-Fa-f]{4}){3}-?[0-9A-Fa-f]{12}", text):
        raise read.fail("uuid", f"{text!r}: 32 hexadecimal digits, as uuidgen prints them")
    return uuid_module.UUID(text).bytes


def _path(text: str, base: Path) -> str:
    """Relative to the working directory, as xl has it; else beside the configuration."""
    if not text or text.startswith("/") or _exists(Path(text)):
        return text
    beside = base / text
    return str(beside) if _exists(beside) else text


def _exists(path: Path) -> bool:
    """Of a path of any kind: one that is too long is none (and named when it is opened)."""
    try:
        return path.exists()
    except OSError:
        return False


def _device(read: _Reader, key: str, text: str, at: Value, parser: Callable[[str, str], Parsed]) -> Parsed:
    try:
        return parser(text, f"{read.source}:{at.line}:{at.column}")
    except ConfigError as error:
        raise ConfigError(
            error.text.partition(f"{at.line}:{at.column}: ")[2] or error.text, read.source, at.line, at.column
        ) from None


def _cpus(read: _Reader) -> list[set[int] | None]:
    setting = read.settings.get("cpus")
    if setting is None:
        return []
    value = setting.value
    items = value.data if isinstance(value.data, list) else [value]
    return [_cpu_list(read, item) for item in items]


def _cpu_list(read: _Reader, item: Value) -> set[int] | None:
    """ "0-3,5,^1" or "all" or a number."""
    if isinstance(item.data, list):
        raise read.fail("cpus", 'must be a string such as "0-3,^1"', item)
    try:
        return parse_cpus(str(item.data))
    except ValueError as error:
        raise read.fail("cpus", str(error), item) from None
