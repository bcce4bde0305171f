"""`streamflow topology APP`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from streamflow.cli.options import Session
from streamflow.cli.output import as_json, introduce, write


def topology(
    session: Session,
    format: Annotated[
        Literal["text", "json", "mermaid"], typer.Option("--format", "-f", help="How to print it.")
    ] = "text",
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Print the graph of topics, agents and steps."""
    introduce(session)
    graph = session.app.topology()
    if json or format == "json":
        write([as_json(graph.to_json())])
    else:
        write([(graph.to_mermaid() if format == "mermaid" else graph.to_text()).rstrip("\n")])
