"""`fomoe stop`: ends this user's servers, which takes their actors along."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from fomoe.cli.runfile import running_servers, stop_server
from fomoe.config import runtime_dir
from fomoe.errors import FomoeError


def stop(
    port: Annotated[
        int | None, typer.Option(metavar="N", help="Stop the server on this port alone.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long to wait for each server.")
    ] = 45.0,
    as_json: Annotated[bool, typer.Option("--json", help="List what was stopped as JSON.")] = False,
) -> None:
    """Stop the servers that `fomoe serve` runs for this user; a Ray cluster stays up."""
    servers = [
        server
        for server in running_servers(runtime_dir())
        if port is None or server.url.endswith(f":{port}")
    ]
    stubborn = [server.pid for server in servers if not stop_server(server, timeout)]
    stopped = [server for server in servers if server.pid not in stubborn]
    if as_json:
        typer.echo(json.dumps([asdict(server) for server in stopped]))
    else:
        for server in stopped:
            typer.echo(f"stopped {server.url} ({server.model}, pid {server.pid})")
        if not servers:
            typer.echo(
                f"no server of this user is running{'' if port is None else f' on port {port}'}"
            )
    if stubborn:
        pids = " ".join(map(str, stubborn))
        raise FomoeError(f"still running after {timeout:g} s: kill -9 {pids} would end it at once")
