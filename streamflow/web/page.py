"""The status page: one self-contained HTML document, readable without JavaScript, refreshed with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Protocol

from streamflow.runtime.status import TaskStatus, WorkerStatus
from streamflow.web.overview import Overview

REFRESH_S = 2

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #667085; --line: #e4e7ec; --paper: #f7f8fa; --card: #fff;
  --good: #067647; --good-soft: #d8f3e3; --bad: #b42318; --bad-soft: #fee4e2; --busy: #93610a; --busy-soft: #fdf0cf;
  --accent: #3a5ccc; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2b3342; --paper: #12161d;
  --card: #1a202a; --good: #75e0a7; --good-soft: #10402a; --bad: #fda29b; --bad-soft: #55160c; --busy: #fec84b;
  --busy-soft: #4e3206; --accent: #9db2ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main, header { max-width: 62rem; margin: 0 auto; padding: 0 1.25rem; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .75rem; padding-top: 2rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 2rem 0 .5rem; }
header nav { margin-left: auto; display: flex; gap: 1rem; }
a { color: var(--accent); }
.soft { color: var(--soft); }
.badge { padding: .1rem .6rem; border-radius: 1rem; font-size: .85rem; font-weight: 600; white-space: nowrap; }
.good { color: var(--good); background: var(--good-soft); }
.bad { color: var(--bad); background: var(--bad-soft); }
.busy { color: var(--busy); background: var(--busy-soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow-x: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .35rem 1.25rem; margin: 0; padding: 1rem 1.25rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .45rem 1.25rem; border-top: 1px solid var(--line); vertical-align: top; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: .85rem; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
footer { margin: 2rem 0; font-size: .85rem; }
"""

_SCRIPT = """
setInterval(async () => {
  const note = document.getElementById("connection");
  try {
    const answer = await fetch(location.href, { cache: "no-store" });
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    document.querySelector("main").replaceWith(fresh.querySelector("main"));
    document.querySelector("header").replaceWith(fresh.querySelector("header"));
  } catch { if (note) { note.textContent = "no answer"; note.className = "badge bad"; } }
}, SECONDS * 1000);
"""


class View(Protocol):
    """One worker process; `site.ProcessView` is one."""

    @property
    def index(self) -> int | None: ...
    @property
    def status(self) -> WorkerStatus | None: ...
    @property
    def not_live(self) -> str: ...
    @property
    def not_ready(self) -> str: ...


def render(overview: Overview, views: Sequence[View]) -> str:
    """Make the page.

    Args:
        overview: What it says about the app.
        views: Its worker processes.
    """
    script = _SCRIPT.replace("SECONDS", str(REFRESH_S))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(overview.app)} · StreamFlow</title>
<link rel="icon" href="data:,">
<noscript><meta http-equiv="refresh" content="{REFRESH_S}"></noscript>
<style>{_STYLE}</style>
</head>
<body>
{_header(overview, views)}
<main>
{_facts(overview, views)}
{_processes(views) if any(view.index is not None for view in views) else ""}
{_agents(overview)}
{_topics(overview)}
{_partitions(views)}
{_standbys(views)}
<footer class="soft">StreamFlow {escape(overview.version)}</footer>
</main>
<script>{script}</script>
</body>
</html>
"""


def _header(overview: Overview, views: Sequence[View]) -> str:
    tables = '<a href="/tables">tables</a> ' if overview.tables else ""
    return f"""<header>
<h1>{escape(overview.app)}</h1>
{_badge(views)} <span id="connection"></span>
<nav>{tables}<a href="/metrics">metrics</a> <a href="/live">live</a> <a href="/ready">ready</a></nav>
</header>"""


def _badge(views: Sequence[View]) -> str:
    stuck = [view.not_live for view in views if view.not_live]
    if stuck:
        return f'<span class="badge bad" title="{escape("; ".join(stuck))}">no progress</span>'
    waiting = [view.not_ready for view in views if view.not_ready]
    if waiting:
        state = _state(views[0].status) if len(views) == 1 and views[0].status else "not ready"
        return f'<span class="badge busy" title="{escape("; ".join(waiting))}">{escape(state)}</span>'
    return '<span class="badge good">running</span>'


def _state(status: WorkerStatus) -> str:
    return "restoring" if any(task.restoring is not None for task in status.tasks) else status.state


def _facts(overview: Overview, views: Sequence[View]) -> str:
    statuses = [view.status for view in views if view.status]
    ages = [status.last_commit_age_s for status in statuses if status.last_commit_age_s is not None]
    lags = [p.lag for status in statuses for task in status.tasks for p in task.partitions if p.lag is not None]
    rebalances = max((status.rebalances for status in statuses), default=0)
    rebalance_s = max((status.rebalance_s for status in statuses), default=0.0)
    facts = {
        "Broker": f"<code>{escape(overview.broker)}</code>",
        "Guarantee": escape(overview.guarantee.replace("_", " ")),
        "Data directory": f"<code>{escape(overview.data_dir)}</code>",
        "Lag": f"{sum(lags):,} records in {len(lags)} partitions" if lags else "nothing assigned",
        "Last commit": f"{min(ages):.1f} s ago" if ages else "none yet",
        "Rebalances": f"{rebalances} ({rebalance_s:.2f} s)",
    }
    for view in views:
        if reason := view.not_live or view.not_ready:
            facts[f"Waiting{'' if view.index is None else f' ({view.index})'}"] = escape(reason)
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    return f'<h2>At a glance</h2><div class="card"><dl>{rows}</dl></div>'


def _processes(views: Sequence[View]) -> str:
    rows = []
    for view in views:
        status = view.status
        partitions = sum(len(task.partitions) for task in status.tasks) if status else 0
        rows.append([str(view.index), escape(status.state if status else view.not_live), _Number(f"{partitions:,}")])
    return _table("Processes", ["process", "state", _Number("partitions")], rows)


def _agents(overview: Overview) -> str:
    rows = [
        [f"<code>{escape(agent.name)}</code>", _codes(agent.sources), _codes(agent.sinks)] for agent in overview.agents
    ]
    return _table("Agents", ["agent", "reads", "writes"], rows)


def _topics(overview: Overview) -> str:
    return _table("Topics", ["topic"], [[f"<code>{escape(topic)}</code>"] for topic in overview.topics])


def _partitions(views: Sequence[View]) -> str:
    several = any(view.index is not None for view in views)
    rows: list[tuple[tuple[str, int], list[str]]] = []
    for view in views:
        for task in view.status.tasks if view.status else ():
            for partition in task.partitions:
                cells = [f"<code>{escape(partition.topic)}</code>", _Number(str(partition.partition))]
                cells += [
                    _Number(_count(number)) for number in (partition.position, partition.end_offset, partition.lag)
                ]
                cells.append(escape(_task(task)))
                if several:
                    cells.append(str(view.index))
                rows.append(((partition.topic, partition.partition), cells))
    head = ["topic", *(_Number(name) for name in ("partition", "position", "end", "lag")), "task"]
    return _table(
        "Partitions",
        head + (["process"] if several else []),
        [cells for _, cells in sorted(rows, key=lambda row: row[0])],
    )


def _standbys(views: Sequence[View]) -> str:
    """Nothing where there are none."""
    rows = []
    for view in views:
        for each in view.status.standbys if view.status else ():
            kind = "given up" if each.given_up else "warm-up" if each.warm_up else "standby"
            cells = [f"<code>{escape(each.task)}</code>", kind, _Number(_count(each.lag)), _Number(f"{each.records:,}")]
            rows.append([*cells, "" if view.index is None else str(view.index)])
    if not rows:
        return ""
    return _table("Standbys", ["task", "kind", _Number("lag"), _Number("applied"), "process"], sorted(rows))


class _Number(str):
    """A cell that stands to the right."""

    __slots__ = ()


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(_cell("td", cell) for cell in row) + "</tr>" for row in rows)
    if not body:
        return f'<h2>{title}</h2><div class="card"><dl><dt>none</dt></dl></div>'
    top = "".join(_cell("th", cell) for cell in head)
    return f'<h2>{title}</h2><div class="card"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(tag: str, text: str) -> str:
    return f'<{tag} class="number">{text}</{tag}>' if isinstance(text, _Number) else f"<{tag}>{text}</{tag}>"


def _codes(names: Sequence[str]) -> str:
    return ", ".join(f"<code>{escape(name)}</code>" for name in names) or '<span class="soft">nothing</span>'


def _count(number: int | None) -> str:
    return "…" if number is None else f"{number:,}"


def _task(task: TaskStatus) -> str:
    stuck = f", {task.oldest_in_flight_s:.0f} s on one record" if task.oldest_in_flight_s >= 1 else ""
    restoring = "" if task.restoring is None else f", {_to_go(task.restoring.remaining)}"
    return f"{task.task} ({task.state}{restoring}{stuck})"


def _to_go(remaining: int | None) -> str:
    return "not known yet how much" if remaining is None else f"{remaining:,} changelog records to go"
