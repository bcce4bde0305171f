"""`streamflow agents APP`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from streamflow.cli.options import Session
from streamflow.cli.output import as_json, introduce, table, write
from streamflow.web.overview import agent_lines


def agents(
    session: Session,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line, one line an agent.")] = False,
) -> None:
    """List the app's agents: what they read, where their results go, what happens to a record that fails."""
    introduce(session)
    found = agent_lines(session.app)
    if json:
        write(as_json(asdict(agent)) for agent in found)
        return
    rows = [
        [agent.name, ", ".join(agent.sources), ", ".join(agent.sinks) or None, agent.on_error, agent.place]
        for agent in found
    ]
    write(table(["agent", "reads", "writes", "on error", "declared at"], rows))
