"""`streamflow reset APP`: start an app over."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

import typer

from streamflow.cli.options import Session
from streamflow.cli.output import as_json, introduce, note, run_async, write
from streamflow.clock import SystemClock
from streamflow.errors import ConfigurationError, StreamFlowError
from streamflow.log.api import Log
from streamflow.log.connect import connect
from streamflow.runtime import reset as runtime
from streamflow.runtime.reset import ResetPlan, locked_state, plan_reset, start_at

Where = Literal["earliest", "latest"]


def reset(
    session: Session,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    to: Annotated[
        Where | None,
        typer.Option("--to", help="Then commit where to start in the sources; else auto_offset_reset decides."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="What was deleted, one JSON object a line.")] = False,
) -> None:
    """Delete the app's offsets, internal topics and local state, so that it processes its sources again.

    Topics that the app declares keep their records, and what it wrote to them stays. It lists what it will delete and
    asks; workers must be stopped.
    """
    introduce(session)
    with locked_state(session.app, session.settings) as slots:
        plans: list[ResetPlan] = []

        async def look() -> None:
            async with _log(session) as log:
                plans.append(await plan_reset(log, session.app, session.settings, slots))

        run_async(look)
        (plan,) = plans
        for line in _listed(plan, session.settings.data_dir):
            note(line)
        if not plan.is_empty and not yes:
            _ask(session)

        async def do() -> None:
            async with _log(session) as log:
                if not plan.is_empty:
                    await runtime.reset(log, plan)
                    write(as_json(each) for each in _as_objects(plan)) if json else None
                    note(f"app {session.app.id} was reset")
                if to is not None:
                    offsets = await start_at(log, session.app, session.settings, to)
                    note(f"{len(offsets)} partition(s) of its sources start at the {to} offset")

        run_async(do)


def _log(session: Session) -> Log:
    return connect(session.settings.broker, clock=SystemClock(), client_id=f"{session.app.id}-reset")


def _ask(session: Session) -> None:
    if not sys.stdin.isatty():
        raise ConfigurationError(
            "nothing was deleted: there is no terminal to ask at; look at the list above and add --yes"
        )
    sys.stderr.write(f"Delete all of this of app {session.app.id!r}? Type yes: ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise StreamFlowError("nothing was deleted")


def _listed(plan: ResetPlan, data_dir: str) -> list[str]:
    # Where it looked is said: what a worker with another data_dir has kept is not deleted by this run.
    absent = f"no local state in {data_dir}"
    if plan.is_empty:
        return [f"app {plan.group} has no offsets, no internal topics and {absent}: nothing to delete"]
    lines = [f"to be deleted of app {plan.group}:"]
    if plan.offsets:
        lines.append(f"  offsets of group {plan.group}")
        lines += [f"    {tp}: {offset}" for tp, offset in plan.offsets.items()]
    for topic in plan.topics:
        whose = "" if topic.is_declared else ", which the app does not declare"
        lines.append(f"  {topic.kind} topic {topic.name}{whose}, about {topic.records} records")
    lines += [f"  local state {state.path}, {state.size_bytes:,} bytes" for state in plan.state] or [f"  {absent}"]
    return lines


def _as_objects(plan: ResetPlan) -> list[dict[str, Any]]:
    return [
        *(
            {"deleted": "offset", "group": plan.group, "topic": tp.topic, "partition": tp.partition, "offset": offset}
            for tp, offset in plan.offsets.items()
        ),
        *(
            {"deleted": each.kind, "topic": each.name, "records": each.records, "declared": each.is_declared}
            for each in plan.topics
        ),
        *({"deleted": "state", "path": each.path, "size_bytes": each.size_bytes} for each in plan.state),
    ]
