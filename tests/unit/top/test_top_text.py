"""`domicile top` as text: xentop's columns, rates, sorting."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.top.top_samples import WEB, later_sample, sample
from toolstack.top.model import COLUMNS, Vif, ordered, sample_of, summary, with_rates
from toolstack.top.text import run_text, table


def test_the_columns_are_xentops() -> None:
    head = table(sample()).splitlines()[0].split()
    assert head == [
        "NAME",
        "STATE",
        "CPU(sec)",
        "CPU(%)",
        "MEM(k)",
        "MEM(%)",
        "MAXMEM(k)",
        "MAXMEM(%)",
        "VCPUS",
        "NETS",
        "NETTX(k)",
        "NETRX(k)",
        "VBDS",
        "VBD_OO",
        "VBD_RD",
        "VBD_WR",
        "VBD_RSECT",
        "VBD_WSECT",
        "SSID",
    ]


def test_a_row_has_a_word_for_each_column() -> None:
    """Tools split xentop's lines at blanks; `no limit` has one, as it has there."""
    lines = table(with_rates(sample(), later_sample())).splitlines()
    words = {line.split()[0]: line.replace("no limit", "no_limit").split() for line in lines}
    assert {len(row) for row in words.values()} == {len(COLUMNS)}
    web = dict(zip((column.title for column in COLUMNS), words["web"], strict=True))
    assert web == {
        "NAME": "web", "STATE": "-----r", "CPU(sec)": "43", "CPU(%)": "50.0", "MEM(k)": "262144", "MEM(%)": "6.2",
        "MAXMEM(k)": "524288", "MAXMEM(%)": "12.5", "VCPUS": "2", "NETS": "0", "NETTX(k)": "0", "NETRX(k)": "0",
        "VBDS": "2", "VBD_OO": "3", "VBD_RD": "1207", "VBD_WR": "89", "VBD_RSECT": "48211", "VBD_WSECT": "1780", "SSID": "0",
    }  # fmt: skip
    assert words["Domain-0"][6:8] == ["no_limit", "n/a"]
    assert words["build-mach"][0] == "build-mach"


def test_sorting_and_rates() -> None:
    now = with_rates(sample(), later_sample())
    by_cpu = next(column for column in COLUMNS if column.title == "CPU(%)")
    assert next(domain.name for domain in ordered(now, by_cpu, descending=True)) == "web"
    assert [domain.domid for domain in ordered(now, by_cpu, descending=False)][-1] == 3
    assert with_rates(later_sample(), sample()) == sample()  # a machine that was started anew
    assert "4 domains: 1 running, 2 blocked, 1 paused, 0 crashed, 0 dying, 0 shutdown" in summary(now)


def test_batches_end_and_tell_vcpus_and_disks(capsys: pytest.CaptureFixture[str]) -> None:
    samples = iter([sample(), later_sample()])
    run_text(lambda: next(samples), iterations=2, delay=0.0, vcpus=True, vbds=True, full_names=True)
    out = capsys.readouterr().out
    assert out.count("NAME") == 2
    assert "build-machine-of-somebody" in out
    assert "VBD BlkBack  51712 [ca: 0]  OO:        3   RD:     1200   WR:       80  RSECT:      48000" in out
    assert "VCPUs(sec): 0:         20s 1:         21s" in out


def test_network_interfaces_are_counted_as_xentop_counts_them() -> None:
    """As the guest sees them; the columns add up its interfaces."""
    web = replace(WEB, vifs=(Vif(0, 4096, 20, 1, 10240, 30, 2), Vif(1, 1024, 1, 0, 0, 0, 0)))
    text = table(replace(sample(), domains=(web,)), networks=True)
    assert "Net0 RX:    10240bytes       30pkts        0err        2drop" in text
    assert "TX:     4096bytes       20pkts        1err        0drop" in text
    head, row, *_ = text.splitlines()
    cells = dict(zip(head.split(), row.split(), strict=True))
    assert (cells["NETS"], cells["NETTX(k)"], cells["NETRX(k)"]) == ("2", "5", "10")


def test_the_toolstacks_answer_becomes_a_sample() -> None:
    answer = {
        "time": 5.0, "cpus": 2, "total_kib": 100, "free_kib": 40,
        "domains": [{
            "domid": 7, "name": "x", "state": "--b---", "seconds": 1.5, "memory_kib": 10, "max_kib": 0, "ssid": 1,
            "vcpus": [[0, 1, "running", 1.5]], "vbds": [["xvda", 51712, 1, 2, 3, 4, 5, 6, 7]], "vifs": [[0, 4096, 2, 0, 10240, 3, 1]],
        }],
    }  # fmt: skip
    (domain,) = sample_of(answer, "m").domains
    (vbd,) = domain.vbds
    (vif,) = domain.vifs
    assert (vif.tx_bytes, vif.rx_bytes, vif.rx_dropped) == (4096, 10240, 1)
    assert (vbd.out_of_requests, vbd.reads, vbd.writes, vbd.flushes, vbd.discards) == (1, 2, 3, 4, 5)
    assert (vbd.read_sectors, vbd.written_sectors) == (6, 7)
