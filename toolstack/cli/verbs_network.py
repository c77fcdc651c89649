"""Verbs about networks: network-attach, network-list, network-detach; network-host."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from toolstack.cli.output import say
from toolstack.cli.state import ask

Domain = Annotated[str, typer.Argument(metavar="DOMAIN", help="Name or id.")]


def add(app: typer.Typer) -> None:
    """Put the verbs into the command."""
    app.command("network-attach")(network_attach)
    app.command("network-list")(network_list)
    app.command("network-detach")(network_detach)
    app.command("network-host")(network_host)


def network_attach(
    domain: Domain,
    spec: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="As in xl-network-configuration; none needed."),
    ] = None,
) -> None:
    """Give a running guest a network interface. Example: domicile network-attach web bridge=xenbr0 mac=00:16:3e:00:00:07"""
    from toolstack.xlcfg.devices import parse_vif

    ask("network-attach", domain=domain, vif=parse_vif(",".join(spec or []), "network-attach"))


def network_list(
    domain: Annotated[list[str], typer.Argument(metavar="DOMAIN...", help="Name or id.")],
) -> None:
    """Network interfaces of guests. Example: domicile network-list web db"""
    say(network_table([row for name in domain for row in ask("network-list", domain=name)]))


def network_detach(
    domain: Domain,
    device: Annotated[str, typer.Argument(metavar="DEVID|MAC", help="Its number or MAC address.")],
    force: Annotated[bool, typer.Option("--force", help="Even if the guest does not let go of it.")] = False,
) -> None:
    """Take a network interface away from a running guest. Example: domicile network-detach web 0"""
    ask("network-detach", domain=domain, vif=device, force=force)


def network_host(
    bridge: Annotated[str, typer.Argument(metavar="BRIDGE", help="Such as xenbr0.")],
    address: Annotated[
        str,
        typer.Argument(metavar="[ADDRESS/LENGTH]", help="Its own address, and the network's; none: it goes."),
    ] = "",
    dhcp: Annotated[bool, typer.Option("--dhcp/--no-dhcp", help="Give guests addresses.")] = True,
) -> None:
    """A helper host on a bridge: answers ARP and ping, gives guests addresses by DHCP. It forwards nothing.

    Example: domicile network-host xenbr0 10.0.0.1/24
    """
    ask("network-host", bridge=bridge, address=address, dhcp=dhcp)


def network_table(rows: list[dict[str, Any]]) -> str:
    """`xl network-list`."""
    head = (
        f"{'Idx':<3} {'BE':<2} {'Mac Addr.':<17} {'handle':<6} {'state':<5} {'evt-ch':<6} {'tx-':>5}/{'rx-ring-ref':<5} "
        f"{'BE-path':<30}"
    )
    return "\n".join(
        [
            head,
            *(
                f"{row['devid']:<3} {row['backend_id']:<2} {row['mac']} {row['handle']:>6} {row['state']:>5} "
                f"{row['event_channel']:>6} {row['tx_ring_ref']:>5}/{row['rx_ring_ref']:<11} {row['path']:<30}"
                for row in rows
            ),
        ]
    )
