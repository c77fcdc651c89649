"""docs/reference.md is what the code says; every verb teaches with an example; machine files are understood or refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from toolstack import errors
from toolstack.cli.app import app
from toolstack.cli.reference import STATUSES, reference
from toolstack.errors import InputError
from toolstack.machinefile import read_machine_file

PAGE = Path(__file__).parents[3] / "docs" / "reference.md"


def test_the_page_is_current() -> None:
    """Whoever changes a verb makes it anew: `python -m toolstack.cli.reference > docs/reference.md`."""
    assert PAGE.read_text(encoding="utf-8") == reference()


def test_each_exit_status_of_the_code_is_told() -> None:
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert codes == {status for status, _ in STATUSES}


def verbs(command: Any, prefix: str = "domicile") -> Iterator[tuple[str, Any]]:
    for name, verb in command.commands.items():
        if hasattr(verb, "commands"):
            yield from verbs(verb, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", verb


def test_each_verb_has_an_example_of_itself_and_each_option_a_help() -> None:
    for name, verb in verbs(typer.main.get_command(app)):
        text = verb.help or ""
        assert "Example" in text, name
        words = " ".join(text.partition("Example")[2].split()).replace("domicile -M test ", "domicile ")
        assert name in words, name
        assert [param.name for param in verb.params if not getattr(param, "help", None)] == [], name


def write(tmp_path: Path, text: str) -> str:
    for name in ("vmlinuz", "disk.img"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "db.cfg").write_text("name='db'\nkernel='vmlinuz'\nmemory=64\n")
    path = tmp_path / "m.toml"
    path.write_text(text)
    return str(path)


def test_a_machine_file_is_understood(tmp_path: Path) -> None:
    """Files are looked for beside it; values of TOML's become xl.cfg's; a configuration is taken as it is, further keys go before."""
    found = read_machine_file(
        write(
            tmp_path,
            '[machine]\nmemory = 2048\ncpus = 2\ndomio = "guest"\n[[domain]]\nname = "web"\nkernel = "vmlinuz"\ncmdline = \'a "b" \\c\'\n'
            'vcpus = 2\ncpus = ["0", "1"]\ndisk = ["disk.img,raw,xvda,w"]\n[[domain]]\nconfig = "db.cfg"\nmemory = 99\npaused = true\n',
        )
    )
    assert (found.memory, found.cpus, found.domio) == (2048, 2, "guest")
    (web, web_paused), (db, db_paused) = found.domains
    assert (web.name, web.vcpus, web.cmdline, web.cpus) == ("web", 2, 'a "b" \\c', [{0}, {1}])
    assert web.kernel == str(tmp_path / "vmlinuz")
    assert (db.name, db.memory, web_paused, db_paused) == ("db", 99, False, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[machine\n", "m.toml: Expected ']' at the end of a table declaration (at line 1, column 9)"),
        ("[machine]\nmemory = 1\n", "m.toml: machine.memory: 1: a number from 64 to 1048576"),
        ("[machine]\nmemory = true\n", "m.toml: machine.memory: True: a number from 64"),
        ("[machine]\nname = 'x'\n", "m.toml: machine.name: there are memory, cpus, domio"),
        ("[machine]\ndomio = 'linux'\n", "m.toml: machine.domio 'linux': there are native, guest"),
        ("[domains]\n", "m.toml: domains: there are [machine] and [[domain]]"),
        ("[domain]\nname = 'x'\n", "m.toml: domain: write [[domain]], once for each"),
        ("[[domain]]\nkernel = 'vmlinuz'\n", "m.toml: domain 1: name is missing"),
        (
            "[[domain]]\nname = 'x'\nkernel = 'vmlinuz'\nmemroy = 5\n",
            "m.toml: domain x: memroy: there is no such key: do you mean memory?",
        ),
        (
            "[[domain]]\nname = 'x'\nkernel = 'vmlinuz'\nmemory = 1.5\n",
            "m.toml: domain x: memory: text, a number, or a list of them",
        ),
        ("[[domain]]\nname = 'x'\nkernel = 'vmlinuz'\nvcpus = 1000\n", "m.toml: domain x: vcpus: "),
        (
            "[[domain]]\nname = 'x'\nkernel = 'vmlinuz'\npaused = 1\n",
            "m.toml: domain x: paused: true or false",
        ),
        (
            "[[domain]]\nname = 'x'\nkernel = 'vmlinuz'\ncmdline = \"a\\nb = 1\"\n",
            "m.toml: domain x: cmdline: one line of text",
        ),
        ("[[domain]]\n'a b' = 1\n", "m.toml: domain 1: a b: there is no such key"),
        ("[[domain]]\nconfig = 'no.cfg'\n", "no.cfg: No such file or directory"),
        (
            "[[domain]]\nconfig = 'db.cfg'\n[[domain]]\nconfig = 'db.cfg'\n",
            "m.toml: two domains are named 'db'",
        ),
    ],
)
def test_a_bad_machine_file_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_machine_file(write(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_machine_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_machine_file(str(tmp_path / "none.toml"))
