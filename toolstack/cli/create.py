"""`domicile create`."""

from __future__ import annotations

import json

from toolstack.cli.images import Images, make_config
from toolstack.cli.output import say, warn
from toolstack.cli.state import connect
from toolstack.xlcfg.model import load


def create_domain(
    file: str, settings: list[str], *, paused: bool, attach: bool, dry_run: bool, quiet: bool
) -> None:
    """Make and start what the configuration describes. ConfigError, MachineError."""
    if not quiet:
        say(f"Parsing config from {file}")
    config = load(file, settings)
    if not quiet:
        for warning in config.warnings:
            warn(warning)
    with Images() as images:
        fields = {**config.domain_fields(), "paused": paused}
        domain = make_config(fields, images)
        if dry_run:
            shown = {**config.model_dump(exclude={"uuid", "cpus"}), "uuid": config.uuid.hex()}
            shown["cpus"] = ["all" if entry is None else sorted(entry) for entry in config.cpus]
            say(json.dumps(shown, indent=4))
            return
        client = connect()
        try:
            number = client.request("create", {"config": domain, "attach": attach}, images.descriptors)
            if attach:
                from toolstack.cli.attach import converse

                converse(client, config.name, number)
        finally:
            client.close()
