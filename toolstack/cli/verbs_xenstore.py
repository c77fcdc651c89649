"""Verbs on the machine's xenstore, with the names and output of Debian's xenstore-utils."""

from __future__ import annotations

from typing import Annotated

import typer

from toolstack.cli.output import say

Paths = Annotated[list[str], typer.Argument(metavar="PATH...", help="Absolute path.")]


def add(app: typer.Typer) -> None:
    """Put the verbs into the command."""
    for name, verb in (
        ("xenstore-ls", ls),
        ("xenstore-read", read),
        ("xenstore-write", write),
        ("xenstore-rm", rm),
        ("xenstore-list", list_),
        ("xenstore-watch", watch),
    ):
        app.command(name)(verb)


def ls(
    path: Annotated[str, typer.Argument(metavar="[PATH]", help="Where to start.")] = "/",
    full: Annotated[bool, typer.Option("-f", help="Full paths.")] = False,
    permissions: Annotated[bool, typer.Option("-p", help="With permissions.")] = False,
) -> None:
    """The tree below a path. Example: domicile xenstore-ls -f /local/domain/1"""
    from toolstack.cli.xenstore import Store, tree

    with Store() as store:
        for line in tree(store, path, full=full, permissions=permissions):
            say(line)


def read(
    paths: Paths,
    prefix: Annotated[bool, typer.Option("-p", help="Put `PATH: ` before each value.")] = False,
    raw: Annotated[bool, typer.Option("-R", help="Bytes as they are, without escapes.")] = False,
) -> None:
    """Values. Example: domicile xenstore-read -p /local/domain/1/name"""
    from toolstack.cli.terminal import write_all
    from toolstack.cli.xenstore import Store, printable

    with Store() as store:
        for path in paths:
            value = store.read(path)
            start = f"{path}: ".encode() if prefix else b""
            write_all(start + (value if raw else printable(value).encode()) + b"\n")


def write(pairs: Annotated[list[str], typer.Argument(metavar="PATH VALUE...", help="In pairs.")]) -> None:
    """Set values, all of them or none. Example: domicile xenstore-write /tool/mine 1"""
    from toolstack.cli.xenstore import Store
    from toolstack.errors import InputError

    if len(pairs) % 2:
        raise InputError(f"xenstore-write: {pairs[-1]}: has no value: give PATH VALUE pairs")
    with Store() as store:
        store.write_all(list(zip(pairs[::2], pairs[1::2], strict=True)))


def rm(paths: Paths) -> None:
    """Remove paths and all below them. Example: domicile xenstore-rm /tool/mine"""
    from toolstack.cli.xenstore import Store

    with Store() as store:
        for path in paths:
            store.remove(path)


def list_(paths: Paths) -> None:
    """Names of the children. Example: domicile xenstore-list /local/domain"""
    from toolstack.cli.xenstore import Store

    with Store() as store:
        for path in paths:
            for name in store.children(path):
                say(name)


def watch(
    paths: Paths,
    count: Annotated[int, typer.Option("-n", min=0, help="End after so many events; 0: go on.")] = 0,
    timeout: Annotated[float, typer.Option(metavar="S", min=0, help="Then status 124; 0: none.")] = 0,
) -> None:
    """Print each path that changes; each watch tells its own path once at the start. Example: domicile xenstore-watch -n 1 /local/domain/1/memory/target"""
    from toolstack.cli.xenstore import Store

    with Store() as store:
        for path in store.watch(paths, count, timeout):
            print(path, flush=True)
