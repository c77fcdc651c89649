"""xl.cfg: the grammar, each key's treatment, disk and network strings; garbage gives a ConfigError with a position, nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domains.dom0.toolstack.vdev import number_of
from toolstack.xlcfg.devices import parse_disk, parse_vif
from toolstack.xlcfg.errors import ConfigError
from toolstack.xlcfg.grammar import parse
from toolstack.xlcfg.keys import IGNORED, REFUSED, UNDERSTOOD
from toolstack.xlcfg.model import XlConfig, load, understand
from toolstack.xlcfg.pci import parse_nvme, parse_pci


def values(text: str) -> dict[str, object]:
    return {key: setting.value.plain() for key, setting in parse(text, "f").items()}


def model(text: str) -> XlConfig:
    return understand(parse('name="g"\nkernel="/k"\n' + text, "f.cfg"), "f.cfg")


class TestGrammar:
    def test_every_form_of_a_value(self) -> None:
        text = "a = \"x\"; b='y'\n\nc=12 # comment\nd = 0x1F;e=017\nf=[ 'p', 2, # why\n\n [3, ], ]\n"
        assert values(text) == {"a": "x", "b": "y", "c": 12, "d": 31, "e": 15, "f": ["p", 2, [3]]}

    def test_escapes_are_those_of_c(self) -> None:
        assert values(r"""a="\x41\102\n\t\\\"\'" ; b='it\'s "#1"'""") == {
            "a": "AB\n\t\\\"'",
            "b": 'it\'s "#1"',
        }

    def test_a_key_set_twice_keeps_the_last_and_plus_appends(self) -> None:
        assert values("a=1\na=2\nl=['x']\nl+=['y']\ns='p'\ns += 'q'\nn += [1]") == {
            "a": 2,
            "l": ["x", "y"],
            "s": "pq",
            "n": [1],
        }

    @pytest.mark.parametrize(
        "text", ["", "\n\n", "# only a comment", ";;\n;", "a=1", "a=[]", "a=[\n]\r\nb=2\r\n"]
    )
    def test_separators_may_be_missing_or_many(self, text: str) -> None:
        parse(text, "f")

    @pytest.mark.parametrize(
        ("text", "line", "column", "word"),
        [
            ("a=1\nb = ", 2, 4, "missing"),
            ("a=\n", 1, 3, "missing"),
            ("a=[1,\n2", 2, 2, "unexpected end"),
            ("\n  Name='x'", 2, 3, "lower-case"),
            ("a='x", 1, 3, "does not end"),
            ("a=-1", 1, 3, "Python"),
            ("a=09", 1, 3, "no number"),
            ("a=99999999999999999999", 1, 3, "no number"),
            (r"a='\q'", 1, 3, "escape"),
            (r"a='\0'", 1, 3, "escape"),
            ("a=1 b=2", 1, 5, "line of its own"),
            ("l=1\nl+=['x']", 2, 4, "append"),
            ("a=" + "[" * 40 + "]" * 40, 1, 26, "deep"),
        ],
    )
    def test_an_error_says_where_and_what(self, text: str, line: int, column: int, word: str) -> None:
        with pytest.raises(ConfigError, match=word) as caught:
            parse(text, "f.cfg")
        assert (caught.value.line, caught.value.column) == (line, column)
        assert str(caught.value).startswith(f"f.cfg:{line}:{column}: ")
        assert "\n" not in str(caught.value)

    @given(st.text(max_size=200) | st.text("abc=+[],'\"\\#; \n019xnt", max_size=200))
    def test_garbage_is_refused_in_order(self, text: str) -> None:
        problem = None
        try:
            parse(text, "f")
        except ConfigError as error:
            problem = error
        assert problem is None or problem.line or "zero bytes" in problem.text

    def test_nesting_without_end_does_not_exhaust_the_stack(self) -> None:
        with pytest.raises(ConfigError):
            parse("a=" + "[" * 200_000, "f")

    @given(
        st.dictionaries(
            st.from_regex("[a-z][a-z0-9_]{0,8}", fullmatch=True),
            st.recursive(
                st.integers(0, 1 << 40)
                | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
                lambda inner: st.lists(inner, max_size=4),
                max_leaves=8,
            ),
            max_size=5,
        )
    )
    def test_what_is_written_is_read(self, config: dict[str, object]) -> None:
        def shown(value: object) -> str:
            if isinstance(value, list):
                return "[" + ", ".join(shown(item) for item in value) + "]"
            if isinstance(value, str):
                return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
            return str(value)

        assert values("\n".join(f"{key} = {shown(value)}" for key, value in config.items())) == config


class TestKeys:
    def test_a_key_has_one_treatment(self) -> None:
        assert not set(UNDERSTOOD) & set(IGNORED)
        assert not set(UNDERSTOOD) & set(REFUSED)
        assert not set(IGNORED) & set(REFUSED)

    @pytest.mark.parametrize("key", sorted(IGNORED))
    def test_harmless_keys_give_one_warning_with_their_place(self, key: str) -> None:
        (warning,) = model(f"{key} = 1").warnings
        assert warning.startswith(f"f.cfg:3:1: {key} is ignored: ")

    @pytest.mark.parametrize("key", sorted(REFUSED))
    def test_what_is_not_offered_is_refused_with_a_mend_unless_it_is_off(self, key: str) -> None:
        assert model(f"{key} = 0").warnings == []
        assert model(f"{key} = []").warnings == []
        with pytest.raises(ConfigError, match=f"^f.cfg:3:1: {key}: .*: ") as caught:
            model(f"{key} = 1")
        assert caught.value.code == 2

    def test_a_misspelt_key_gets_a_hint(self) -> None:
        with pytest.raises(
            ConfigError, match=r"f\.cfg:3:3: memmory: there is no such key: do you mean memory\?"
        ):
            model("  memmory = 1")


class TestModel:
    def test_defaults_are_those_of_xl(self) -> None:
        config = model("")
        assert (config.type, config.vcpus, config.cpu_weight, config.cap) == ("pv", 1, 256, 0)
        assert (config.on_poweroff, config.on_reboot, config.on_crash) == ("destroy", "restart", "destroy")

    def test_everything_reaches_the_domain(self) -> None:
        fields = model(
            "memory=512; maxmem=1024; vcpus=2; maxvcpus=4; cpu_weight=512; cap=25; root='/dev/xvda1 ro'\nextra='quiet'\n"
            "uuid='00112233-4455-6677-8899-aabbccddeeff'; on_crash='preserve'; ramdisk='/r'"
        ).domain_fields()
        assert fields["cmdline"] == "root=/dev/xvda1 ro quiet"
        assert fields["uuid"].hex() == "00112233445566778899aabbccddeeff"
        wanted = {
            "memory_mb": 512,
            "maxmem_mb": 1024,
            "vcpus": 2,
            "maxvcpus": 4,
            "cpu_weight": 512,
            "cap": 25,
        }
        assert wanted.items() <= fields.items()
        assert fields["on_crash"] == "preserve"
        assert fields["ramdisk"] == "/r"

    def test_the_shim_is_a_pvh_guests(self) -> None:
        """As libxl has it: its own command line, and what is to be added to that."""
        plain = model("type='pvh'; pvshim=1").domain_fields()
        assert (plain["pvshim"], plain["shim_path"], plain["shim_cmdline"]) == (
            True,
            "",
            "pv-shim console=xen,pv",
        )
        told = model(
            "type='pvh'; pvshim=1; pvshim_path='/s'; pvshim_cmdline='pv-shim'; pvshim_extra='loglvl=all'"
        ).domain_fields()
        assert (told["shim_path"], told["shim_cmdline"]) == ("/s", "pv-shim loglvl=all")
        assert "pvshim" not in model("type='pvh'; pvshim=0").domain_fields()
        pv = model("type='pv'; pvshim=1")
        assert "pvshim" not in pv.domain_fields()
        assert "only for PVH guests" in pv.warnings[-1]

    def test_cmdline_stands_above_root_and_extra(self) -> None:
        assert model("cmdline='a b'; root='x'; extra='y'").cmdline == "a b"

    @pytest.mark.parametrize(("old", "kind"), [("generic", "pv"), ("hvm", "hvm")])
    def test_builder_is_understood(self, old: str, kind: str) -> None:
        assert model(f"builder = '{old}'").type == kind

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("memory = 'lots'", "memory: must be a number"),
            ("memory = 0", "memory: "),
            ("vcpus = 1000", "vcpus: "),
            ("memory = 64; maxmem = 32", "maxmem: 32 is less"),
            ("vcpus = 4; maxvcpus = 2", "maxvcpus: 2 is less"),
            ("type = 'xen'", "type: 'xen'"),
            ("on_crash = 'dance'", "on_crash: "),
            ("uuid = 'x'", "uuid: 'x'"),
            ("disk = [ 1 ]", "disk: must be a list of strings"),
            ("disk = [ '/x,raw,xvda', '/y,raw,xvda' ]", "two disks are called xvda"),
            ("disk = [ '/x,raw,banana' ]", "vdev 'banana'"),
            ("vif = [ 'mac=1' ]", "mac '1'"),
            ("cpus = '3-1'", "cpus: '3-1'"),
            ("cpus = '1,^1'", "no processor is left"),
            ("cpu_weight = 0", "cpu_weight: "),
            ("pvshim = 2", "pvshim: must be 0 or 1"),
        ],
    )
    def test_a_bad_value_names_line_key_and_mend(self, text: str, word: str) -> None:
        with pytest.raises(ConfigError, match=word) as caught:
            model(text)
        assert caught.value.line == 3
        assert caught.value.column > 1

    @pytest.mark.parametrize(
        ("text", "word"), [("kernel='/k'", "name is missing"), ("name='x'", "kernel is missing")]
    )
    def test_what_must_be_there(self, text: str, word: str) -> None:
        with pytest.raises(ConfigError, match=word):
            understand(parse(text, "f"), "f")

    @pytest.mark.parametrize(
        ("text", "wanted"),
        [("'all'", [None]), ("'0-3,^1'", [{0, 2, 3}]), ("['0', '1-2']", [{0}, {1, 2}]), ("2", [{2}])],
    )
    def test_processor_lists(self, text: str, wanted: list[set[int] | None]) -> None:
        assert model(f"cpus = {text}").cpus == wanted

    def test_a_string_of_processors_is_for_all_vcpus_and_a_list_for_one_after_the_other(self) -> None:
        assert model("vcpus = 3; cpus = '0-1'").domain_fields()["cpus"] == [[0, 1]] * 3
        assert model("vcpus = 3; cpus = ['1', 'all']").domain_fields()["cpus"] == [[1], None]

    def test_files_beside_the_configuration_are_found_and_the_command_line_adds(self, tmp_path: Path) -> None:
        (tmp_path / "vmlinuz").write_bytes(b"x")
        (tmp_path / "a.cfg").write_text("name='a'\nkernel='vmlinuz'\n")
        config = load(str(tmp_path / "a.cfg"), ["memory=99", "name=other", "extra='p q'"])
        assert (config.kernel, config.memory, config.name) == (str(tmp_path / "vmlinuz"), 99, "other")
        assert config.cmdline == "p q"

    def test_a_kernel_is_no_configuration(self, tmp_path: Path) -> None:
        (tmp_path / "k").write_bytes(b"\x7fELF\x02\x01\xff\xfe\x00")
        with pytest.raises(ConfigError, match="is it the kernel"):
            load(str(tmp_path / "k"))

    @given(
        st.sampled_from(sorted(UNDERSTOOD)),
        st.integers(0, 1 << 62) | st.text(max_size=30) | st.lists(st.text(max_size=20), max_size=3),
    )
    def test_no_value_of_any_key_escapes_as_another_exception(self, key: str, value: object) -> None:
        def shown(item: object) -> str:
            if isinstance(item, list):
                return "[" + ",".join(shown(one) for one in item) + "]"
            if isinstance(item, str):
                return "'" + "".join(c for c in item if c not in "\n\r\0'\\") + "'"
            return str(item)

        told = ""
        try:
            model(f"{key} = {shown(value)}")
        except ConfigError as error:
            told = str(error)
        assert "\n" not in told


class TestDisks:
    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            ("/a.img,raw,xvda,rw", {"target": "/a.img", "format": "raw", "vdev": "xvda", "readonly": False}),
            ("/a.img,,hda", {"format": "raw", "vdev": "hda"}),
            ("/a.img,qcow2,xvda1,r", {"format": "qcow2", "vdev": "xvda1", "readonly": True}),
            ("format=qcow2, vdev=xvdb, access=ro, target=/a,b=c", {"target": "/a,b=c", "readonly": True}),
            ("/a.img,raw,hdc:cdrom,r", {"cdrom": True, "readonly": True}),
            (",,hdc:cdrom", {"format": "empty", "cdrom": True, "target": ""}),
            ("vdev=hdc,cdrom,target=/x.iso", {"cdrom": True, "readonly": True, "target": "/x.iso"}),
            ("vdev=xvda,no-discard,backend=domio,target=/x", {"discard": False, "backend": "domio"}),
            ("file:/x.img,xvda,w", {"target": "/x.img", "vdev": "xvda", "format": "raw"}),
            ("tap:qcow2:/x.img,xvda,w", {"target": "/x.img", "format": "qcow2"}),
            ("phy:/dev/vg/lv,hda,r", {"target": "/dev/vg/lv", "readonly": True}),
            ("/x,raw,d0p1", {"vdev": "d0p1"}),
        ],
    )
    def test_what_xl_takes(self, text: str, wanted: dict[str, object]) -> None:
        assert wanted.items() <= parse_disk(text, "disk").items()

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("", "vdev"),
            ("/x", "no vdev"),
            ("/x,raw,xvda,rw,more", "too many"),
            ("/x,foo,xvda", "format 'foo'"),
            ("/x,vhd,xvda", "not served: convert"),
            ("/x,raw,xvda,maybe", "access 'maybe'"),
            ("vdev=xvda,vdev=xvdb,target=/x", "given twice"),
            ("vdev=xvda,sript=y,target=/x", "unknown parameter 'sript'"),
            ("script=block-iscsi,vdev=xvda,target=/x", "not served"),
            ("iscsi:foo,xvda,w", "not served"),
            ("http://x/y,raw,xvda", "unknown prefix"),
            ("vdev=xvda,format=empty,target=/x", "cdrom drive"),
            ("raw,vdev=xvda,target=", "given twice|no target"),
        ],
    )
    def test_what_is_refused_names_the_string(self, text: str, word: str) -> None:
        with pytest.raises(ConfigError, match=word):
            parse_disk(text, "f.cfg:1:1")

    @given(
        st.text(max_size=60)
        | st.lists(
            st.sampled_from(["raw", "xvda", "vdev=", "target=", ",", ":", "r", "cdrom", "phy:", "/x", "="]),
            max_size=9,
        ).map("".join)
    )
    def test_garbage(self, text: str) -> None:
        for parser in (parse_disk, parse_vif):
            try:
                parser(text, "x")
            except ConfigError:
                continue


class TestNetwork:
    def test_all_that_matters_is_kept(self) -> None:
        text = "mac=00:16:3E:00:00:01, bridge=xenbr0,model=e1000,type=ioemu,ip=10.0.0.1,rate=10Mb/s,mtu=1400,script=vif-bridge"
        assert parse_vif(text, "vif") == {
            "mac": "00:16:3e:00:00:01",
            "bridge": "xenbr0",
            "model": "e1000",
            "type": "ioemu",
            "ip": "10.0.0.1",
            "rate": "10Mb/s",
            "mtu": 1400,
        }

    def test_the_empty_string_is_an_interface(self) -> None:
        assert parse_vif("", "vif") == {}

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ("mac=01:16:3e:00:00:01", "multicast"),
            ("rate=fast", "rate"),
            ("foo", "unknown"),
            ("mtu=1", "68"),
            ("ip=1,ip=2", "twice"),
            ("type=tap", "ioemu or vif"),
        ],
    )
    def test_what_is_refused(self, text: str, word: str) -> None:
        with pytest.raises(ConfigError, match=word):
            parse_vif(text, "vif")


OTHERS = {
    "name": '"b"', "type": '"pvh"', "builder": '"hvm"', "kernel": '"/other"', "ramdisk": '"/r"', "cmdline": '"x"', "root": '"/dev/a"',
    "extra": '"y"', "memory": "99", "maxmem": "99", "vcpus": "3", "maxvcpus": "3", "cpus": '"0"', "cpu_weight": "77", "cap": "50",
    "on_poweroff": '"restart"', "on_reboot": '"destroy"', "on_watchdog": '"restart"', "on_crash": '"restart"',
    "on_soft_reset": '"restart"', "uuid": '"00112233-4455-6677-8899-aabbccddeeff"', "disk": '["/d,raw,xvda,w"]', "vif": '["bridge=x"]', "pci": '["01:00.0"]',
    "boot": '"d"', "serial": '"pty"', "vga": '"none"', "pvshim": "1", "pvshim_path": '"/s"', "pvshim_cmdline": '"x"', "pvshim_extra": '"x"',
    "firmware_override": '"/f"', "bios_path_override": '"/f"', "hap": "0", "vnc": "1", "vnclisten": '"::1"',
    "vncdisplay": "7", "vncunused": "0", "vncpasswd": '"x"', "localtime": "1", "rtc_timeoffset": '"-3600"',
}  # fmt: skip
"""A value of each key that is not its default."""


def made_with(lines: str) -> XlConfig:
    return model(f'name = "a"\nkernel = "/k"\nmemory = 32\n{lines}')


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """India's local time is five and a half hours ahead, all the year."""
    monkeypatch.setenv("TZ", "Asia-5:30")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("lines", "offset"),
    [
        ("", 0),
        ("rtc_timeoffset = 3600", 3600),
        ('rtc_timeoffset = "-7200"', -7200),
        ("localtime = 1", 19_800),
        ("localtime = 0\nrtc_timeoffset = 5", 5),
        ('localtime = 1\nrtc_timeoffset = "-19800"', 0),
    ],
)
def test_the_offset_of_a_guests_clock(zone: None, lines: str, offset: int) -> None:
    assert made_with(lines).domain_fields()["time_offset"] == offset


@pytest.mark.parametrize("value", ['"1h"', "[1]", "1000000000000", '"-1000000000000"'])
def test_an_offset_that_is_none(value: str) -> None:
    with pytest.raises(ConfigError, match="rtc_timeoffset"):
        made_with(f"rtc_timeoffset = {value}")


@pytest.mark.parametrize("key", UNDERSTOOD)
def test_each_key_that_is_understood_has_an_effect_or_gives_a_warning(key: str, zone: None) -> None:
    base = {"name": '"a"', "kernel": '"/k"', "memory": "32", "uuid": '"00000000-0000-0000-0000-000000000001"'}

    def made(settings: dict[str, str]) -> XlConfig:
        return model("\n".join(f"{name} = {value}" for name, value in settings.items()))

    plain, changed = made(base), made(base | {key: OTHERS[key]})
    assert plain.domain_fields() != changed.domain_fields() or len(changed.warnings) > len(plain.warnings)


@pytest.mark.parametrize(
    ("text", "bdf"),
    [
        ("01:00.0", 0x100),
        ("0000:00:1f.7", 0xFF),
        ("0:3:2.1", 0x311),
        ("00:03.0,permissive=1,rdm_policy=strict", 0x18),
        ("bdf=02:00.0", 0x200),
    ],
)
def test_pci_addresses(text: str, bdf: int) -> None:
    assert parse_pci(text, "f") == bdf


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0001:00:03.0", "segment 0 only"),
        ("00:03.0@5", "slot in the guest cannot be chosen"),
        ("00:03.0,color=red", "unknown parameter 'color=red'"),
        ("", "a PCI address is"),
        ("00:23.0", "a PCI address is"),
    ],
)
def test_what_pci_cannot_say(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_pci(text, "f")


def test_nvme_devices() -> None:
    assert parse_nvme("a.img", "f") == {"target": "a.img", "format": "raw", "readonly": False, "bdf": None}
    found = parse_nvme("a.qcow2,qcow2,r,bdf=00:1e.0", "f")
    assert found == {"target": "a.qcow2", "format": "qcow2", "readonly": True, "bdf": 0xF0}
    for text in ("", "a,vhd", "a,bdf=x"):
        with pytest.raises(ConfigError):
            parse_nvme(text, "f")


HVM = "name = 'a'\ntype = 'hvm'\n"


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("", {"vnc_listen": "127.0.0.1", "vnc_display": 0, "vnc_unused": True, "vnc_password": ""}),
        ("vnclisten = 'localhost:3'", {"vnc_listen": "127.0.0.1", "vnc_display": 3}),
        ("vnclisten = '[::1]:3'\nvncdisplay = 4", {"vnc_listen": "::1", "vnc_display": 3}),
        ("vnclisten = '::1'\nvncdisplay = 4", {"vnc_listen": "::1", "vnc_display": 4}),
        ("vncunused = 0\nvncpasswd = 'geheim'", {"vnc_unused": False, "vnc_password": "geheim"}),
    ],
)
def test_vnc(text: str, fields: dict[str, object]) -> None:
    found = model(f"{HVM}vnc = 1\n{text}")
    assert fields.items() <= found.domain_fields().items()
    assert found.domain_fields()["vnc"] is True
    assert "geheim" not in repr(found)
    assert "geheim" not in str(found.model_dump())
    assert "vnc" not in model(f"{HVM}vnc = 0\n{text}").domain_fields()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("vnclisten = 'host'", "vnclisten: 'host': must be an IP address"),
        ("vnclisten = '127.0.0.1:x'", "vnclisten: '127.0.0.1:x': the display"),
        ("vnclisten = '[::1'", r"vnclisten: '\[::1': an address"),
        ("vncdisplay = 60000", "vncdisplay: 60000: a number from 0"),
        ("vncpasswd = 'too long to be one'", "vncpasswd: the protocol looks at 8 bytes"),
        ("vnc = 2", "vnc: must be 0 or 1"),
    ],
)
def test_what_vnc_cannot_be(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        model(f"{HVM}{text}")


@pytest.mark.parametrize("key", ["kernel", "ramdisk"])
def test_a_path_that_is_too_long_is_left_for_whoever_opens_it(key: str, tmp_path: Path) -> None:
    long = "a/" * 3000
    text = f'name="x"\nkernel="k"\n{key}="{long}"\ndisk=["{long},raw,xvda,w"]\n'
    config = understand(parse(text, "f"), "f", tmp_path)
    assert getattr(config, key) == long
    assert config.disks[0]["target"] == long


@pytest.mark.parametrize("text", ["devid=0000000019999", "devid=256", "mtu=0000000001500", "mtu=67"])
def test_numbers_of_interfaces_have_their_bounds_however_they_are_written(text: str) -> None:
    with pytest.raises(ConfigError, match="a number from"):
        parse_vif(text, "f")


@pytest.mark.parametrize(
    "vdev",
    ["0x20000000", "536870912", "9" * 5000, "0x" + "f" * 50, "d" + "9" * 5000, "00012", "xvda" + "1" * 5000],
)
def test_numbers_of_disks_have_a_bound(vdev: str) -> None:
    with pytest.raises(ValueError, match=r"disk|vdev|partition"):
        number_of(vdev)


def test_numbers_of_disks() -> None:
    assert [number_of(v) for v in ("xvda", "hdc", "sdb1", "d0p1", "0xca10", "51728", "0")] == [
        51712, 22 << 8, 8 << 8 | 17, 51713, 51728, 51728, 0,
    ]  # fmt: skip
    assert number_of("d1048575p255") == 0x1FFFFFFF
