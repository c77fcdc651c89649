"""The command's parts without a machine: what run looks for and types, xl's tables, keys that end a session, the doctor."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolstack import doctor
from toolstack.cli.images import name_of, open_image
from toolstack.cli.output import domain_json, domain_table, duration, scheduler_table, vcpu_table
from toolstack.cli.run import COUNTERS, Run, RunRequest
from toolstack.cli.script import WINDOW, ConsoleScript, compile_pattern, decode_escapes
from toolstack.cli.terminal import EscapeKeys, write_all
from toolstack.cli.xenstore import printable
from toolstack.errors import EXIT_TIMEOUT, InputError, MachineError

ROW = {
    "domid": 1,
    "name": "web",
    "mem_mb": 128,
    "max_mb": 128,
    "vcpus": 2,
    "state": "-b----",
    "time_s": 12.34,
    "uuid": "00112233445566778899aabbccddeeff",
    "config": {"type": "pv", "memory_mb": 128, "kernel_path": "/k", "vcpus": 2, "cpu_weight": 256, "cap": 0},
}


class TestScript:
    def test_until_is_found_across_any_cut_of_the_output(self) -> None:
        text = b"Welcome\r\ngrub> "
        for cut in range(len(text)):
            script = ConsoleScript(until=re.compile(b"grub> "))
            script.feed(text[:cut])
            script.feed(text[cut:])
            assert script.matched == "grub> "

    def test_pairs_go_in_order_and_each_sees_only_what_follows_the_last(self) -> None:
        pairs = [(re.compile(b"> "), b"one\r"), (re.compile(b"> "), b"two\r")]
        script = ConsoleScript(pairs=pairs, until=re.compile(b"done"))
        assert script.feed(b"done > ") == b"one\r"
        assert script.matched is None  # it stood before the pairs
        assert script.feed(b"hm > ") == b"two\r"
        assert script.waits_for == "done"
        script.feed(b"done")
        assert script.matched == "done"

    def test_two_prompts_in_one_piece_answer_both(self) -> None:
        script = ConsoleScript(pairs=[(re.compile(b"a"), b"1"), (re.compile(b"b"), b"2")])
        assert script.feed(b"ab") == b"12"

    @pytest.mark.parametrize("size", [1, 2, 3, 1000])
    def test_a_screens_control_sequences_do_not_hide_what_was_written(self, size: int) -> None:
        """As SeaBIOS's serial console writes: the cursor is moved in the middle of a word."""
        data = b"\x1bc\x1b[?7l\x1b[2J\x1b[0mGNU G\r\x1b[04;12HR\x1b[04;13H\x1b[04;14HUB\r\n\x1b(Bready\x1b[0m"
        script = ConsoleScript(until=re.compile(rb"GNU GRUB\r\nready"), plain=True)
        for start in range(0, len(data), size):
            script.feed(data[start : start + size])
        assert script.matched == "GNU GRUB\r\nready"

    def test_input_is_typed_once_after_the_first_output(self) -> None:
        script = ConsoleScript(first=b"x\r")
        assert script.feed(b"") == b""
        assert script.feed(b"a") == b"x\r"
        assert script.feed(b"b") == b""
        assert script.written == 2

    @given(st.lists(st.binary(max_size=9000), max_size=20))
    def test_memory_is_bounded(self, pieces: list[bytes]) -> None:
        script = ConsoleScript(until=re.compile(b"never\xff\xfe\xfd\xfc\xfb\xfa"))
        for piece in pieces:
            script.feed(piece)
            assert len(script._text) <= WINDOW

    def test_escapes(self) -> None:
        assert decode_escapes(r"a\r\n\x03\\\0é", "--send") == b"a\r\n\x03\\\0" + "é".encode()
        with pytest.raises(InputError, match=r"--send .* unknown escape"):
            decode_escapes(r"\q", "--send")
        with pytest.raises(InputError):
            decode_escapes("end\\", "--send")

    @given(st.text(max_size=40))
    def test_patterns_and_escapes_never_fail_otherwise(self, text: str) -> None:
        for reader in (compile_pattern, decode_escapes):
            told = "--x"
            try:
                reader(text, "--x")
            except InputError as error:
                told = str(error)
            assert "--x" in told


class TestTables:
    def test_list_has_xls_columns(self) -> None:
        assert domain_table([ROW]).split("\n") == [
            "Name                                        ID   Mem VCPUs\tState\tTime(s)",
            "web                                          1   128     2     -b----      12.3",
        ]

    def test_vcpu_list(self) -> None:
        every = {"online": True, "hard": [0, 1, 2, 3], "soft": [0, 1, 2, 3], "cpus": 4}
        some = {"online": False, "hard": [0, 2, 3], "soft": [1], "cpus": 4}
        rows = [
            {"name": "web", "domid": 1, "vcpu": 0, "cpu": 1, "state": "-b-", "time_s": 0.5, **every},
            {"name": "web", "domid": 1, "vcpu": 1, "cpu": 0, "state": "---", "time_s": 0.0, **some},
        ]
        header, first, second = vcpu_table(rows).split("\n")
        assert (
            header
            == "Name                                ID  VCPU   CPU State   Time(s) Affinity (Hard / Soft)"
        )
        assert first == "web                                  1     0     1   -b-       0.5  all / all"
        assert second == "web                                  1     1     -   --p       0.0  0,2-3 / 1"

    def test_scheduler_and_uptime(self) -> None:
        rows = [{"name": "web", "domid": 1, "weight": 512, "cap": 25}]
        assert scheduler_table(rows).split("\n")[1] == "web                                  1    512   25"
        assert duration(3661) == " 1:01:01"
        assert duration(2 * 86400 + 5) == "2 days,  0:00:05"

    def test_long_list_has_libxls_names(self) -> None:
        import json

        (entry,) = json.loads(domain_json([ROW]))
        assert entry["domid"] == 1
        assert entry["config"]["c_info"] == {
            "type": "pv",
            "name": "web",
            "uuid": "00112233-4455-6677-8899-aabbccddeeff",
        }
        assert entry["config"]["b_info"]["target_memkb"] == 131072

    def test_xenstore_values_are_shown_on_one_line(self) -> None:
        assert printable(b'a"b\n\\\x00\xff') == 'a"b\\n\\\\\\000\\377'


class TestTerminal:
    def test_the_escape_key_ends_and_hides_what_follows(self) -> None:
        assert EscapeKeys().feed(b"ab\x1dcd", 0.0) == (b"ab", True)

    def test_interrupt_goes_to_the_guest_unless_pressed_three_times_within_a_second(self) -> None:
        keys = EscapeKeys()
        assert keys.feed(b"\x03", 0.0) == (b"\x03", False)
        assert keys.feed(b"\x03", 0.9) == (b"\x03", False)
        assert keys.feed(b"\x03", 1.5) == (b"\x03", False)  # the first is too long ago
        assert keys.feed(b"x\x03\x03", 1.6) == (b"x\x03\x03", False)  # another key starts anew
        assert keys.feed(b"\x03", 1.7) == (b"", True)

    def test_output_is_whole_even_where_the_descriptor_does_not_block(self) -> None:
        read, write = os.pipe()
        os.set_blocking(write, False)
        import threading

        got = bytearray()

        def reader() -> None:
            while data := os.read(read, 65536):
                got.extend(data)

        thread = threading.Thread(target=reader)
        thread.start()
        data = bytes(range(256)) * 4096
        write_all(data, write)
        os.close(write)
        thread.join(20)
        os.close(read)
        assert bytes(got) == data

    def test_a_reader_that_takes_nothing_ends_the_wait(self) -> None:
        """The pipe blocks, and is full: TimeoutError after the time that was given, not after each write."""
        read, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="took nothing more within"):
            write_all(bytes(100_000), write, timeout=0.2)
        assert 0.15 < time.monotonic() - start < 10
        os.close(read)
        with pytest.raises(BrokenPipeError):
            write_all(b"x", write, timeout=0.2)
        os.close(write)


class TestRecord:
    def make(self, stats: dict[str, object]) -> dict[str, object]:
        run = Run(RunRequest({"name": "web", "kernel": "/k"}, ConsoleScript()))
        run.outcome.stats = stats
        return run.record()

    def test_what_nobody_counted_is_null_and_named(self) -> None:
        record = self.make({})
        assert [record[name] for name in COUNTERS] == [None, None, None]
        assert record["not_counted"] == list(COUNTERS)

    def test_what_was_counted_as_nothing_is_no_null(self) -> None:
        record = self.make({"hypercalls": {}, "events": 0})
        assert (record["hypercalls"], record["exceptions"], record["events"]) == ({}, None, 0)
        assert record["not_counted"] == ["exceptions"]


class TestCollect:
    def test_a_guest_that_does_not_answer_at_its_timeout_is_told(self) -> None:
        """Where it was is not known: the record and standard error say why."""

        def refuse(*args: object, **more: object) -> None:
            raise MachineError("domain web, vCPU 0: its process does not answer")

        run = Run(RunRequest({"name": "web", "kernel": "/k"}, ConsoleScript()))
        run.outcome.status = EXIT_TIMEOUT
        run._collect(cast(Any, SimpleNamespace(client=SimpleNamespace(request=refuse))))
        assert run.record()["details"] == "domain web, vCPU 0: its process does not answer"


class TestImages:
    @pytest.mark.parametrize(
        ("path", "word"), [("/nope", "no such file"), ("/", "not a regular"), ("/dev/null", "not a regular")]
    )
    def test_a_file_that_cannot_be_an_image(self, path: str, word: str) -> None:
        with pytest.raises(InputError, match=f"kernel {path}: {word}"):
            open_image(path, "kernel")

    @given(st.text(max_size=100))
    def test_any_file_name_gives_a_domain_name(self, name: str) -> None:
        assert re.fullmatch(r"[A-Za-z0-9_.+-]{1,64}", name_of(f"/x/{name}"))


class TestDoctor:
    def test_a_host_that_runs_these_tests_is_fit_and_nothing_stays_open(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        findings = list(doctor.examine())
        assert [finding.name for finding in findings if finding.fatal and not finding.ok] == []
        assert len(os.listdir("/proc/self/fd")) == before

    def test_what_is_missing_is_told_with_its_mend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))
        with pytest.raises(MachineError, match=r"only 64 open files allowed: raise the limit: ulimit"):
            doctor.require_quick(64)

    def test_too_little_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "_available_mb", lambda: 100)
        with pytest.raises(MachineError, match=r"100 MB of memory available, 378 wanted"):
            doctor.require_quick(128)

    def test_a_kernel_without_memfd(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> int:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(os, "memfd_create", refuse)
        finding = next(finding for finding in doctor.examine() if finding.name == "memfd")
        assert (finding.ok, finding.fatal, bool(finding.mend)) == (False, True, True)
