import re
from html.parser import HTMLParser

import httpx
import pytest

from streamflow.runtime.status import PartitionStatus, RestoreStatus, StandbyStatus, TaskStatus
from streamflow.web.site import ProcessView, build_site
from tests.web.status import overview, status

RESTORING = status(
    ready=False,
    tasks=(
        TaskStatus("orders-0", "running", (), 0.0),
        TaskStatus(
            "orders-1",
            "restoring",
            (PartitionStatus("orders", 1, 0, None, None),),
            0.0,
            RestoreStatus(12_345, 67_890, 4_321.0),
        ),
    ),
)


class FakeSource:
    def __init__(self, *views: ProcessView) -> None:
        self.views = views

    async def metrics(self) -> bytes:
        return b"streamflow_commits_total 3.0\n"

    async def processes(self):
        return self.views


async def get(path: str, *views: ProcessView, shown=None) -> httpx.Response:
    site = build_site(FakeSource(*(views or [ProcessView(None, status())])), lambda: shown or overview())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(site), base_url="http://test") as client:
        return await client.get(path)


async def test_metrics():
    answer = await get("/metrics")
    assert answer.text == "streamflow_commits_total 3.0\n"
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


@pytest.mark.parametrize("question", ["live", "ready"])
async def test_all_is_well(question):
    answer = await get(f"/{question}")
    assert (answer.status_code, answer.json()) == (200, {question: True})


@pytest.mark.parametrize(
    ("path", "views", "expected"),
    [
        (
            "/live",
            [ProcessView(None, status(live=False, live_reason="no commit for 40 s"))],
            {"live": False, "reason": "the worker: no commit for 40 s"},
        ),
        (
            "/ready",
            [ProcessView(None, status(ready=False, state="starting"))],
            {"ready": False, "reason": "the worker is starting"},
        ),
        (
            "/ready",
            [ProcessView(None, RESTORING)],
            {
                "ready": False,
                "reason": "the worker is restoring task orders-1: 12,345 records so far, 67,890 to go, 4,321/s",
            },
        ),
        (
            "/ready",
            [ProcessView(0, status()), ProcessView(1, None, "starting", starting=True)],
            {"ready": False, "reason": "process 1: starting"},
        ),
        (
            "/live",
            [ProcessView(0, None, "does not answer"), ProcessView(1, None, "restarting after SIGKILL")],
            {"live": False, "reason": "process 0: does not answer; process 1: restarting after SIGKILL"},
        ),
    ],
)
async def test_what_is_not_well_is_503_with_its_reason(path, views, expected):
    answer = await get(path, *views)
    assert (answer.status_code, answer.json()) == (503, expected)


async def test_a_process_that_was_just_started_is_not_held_dead():
    assert (await get("/live", ProcessView(0, None, "starting", starting=True))).status_code == 200


async def test_the_status_as_json():
    (answer,) = (await get("/status.json")).json()
    assert answer["status"]["tasks"][0]["partitions"][0]["lag"] == 3


async def test_nothing_else_is_there():
    assert (await get("/docs")).status_code == 404


# --- the page -------------------------------------------------------------------------------------------------------


class Balanced(HTMLParser):
    VOID = frozenset({"meta", "link", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def text_of(page: str) -> str:
    parser = Balanced()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("<body>")[1]))


async def test_the_page_shows_the_app():
    page = (await get("/")).text
    text = text_of(page)
    for shown in (
        "shop",
        "running",
        "exactly once",
        "memory://",
        "total",
        "orders",
        "totals",
        "3 records",
        "StreamFlow",
    ):
        assert shown in text
    assert "Processes" not in text
    assert 'href="/metrics"' in page


async def test_the_page_lists_standbys_where_there_are_any():
    assert "Standbys" not in text_of((await get("/")).text)
    kept = (
        StandbyStatus("orders-2", warm_up=False, lag=1_234, records=5_678),
        StandbyStatus("orders-3", warm_up=True, lag=None, records=0),
        StandbyStatus("orders-4", warm_up=False, lag=None, records=0, given_up="damaged"),
    )
    text = text_of((await get("/", ProcessView(None, status(standbys=kept)))).text)
    assert "orders-2 standby 1,234 5,678 orders-3 warm-up" in text
    assert "orders-4 given up" in text


async def test_the_page_needs_nothing_from_elsewhere():
    page = (await get("/")).text
    assert not re.search(r'(src|href)="(https?:)?//', page)
    assert "@import" not in page


async def test_the_page_escapes_names():
    shown = overview(app="<script>alert(1)</script>", broker="a&b", topics=('"><b>',))
    page = (await get("/", shown=shown)).text
    assert "<script>alert" not in page
    assert "<b>" not in page
    assert "a&amp;b" in page


async def test_the_page_says_what_is_wrong():
    stuck = ProcessView(None, status(live=False, live_reason="record orders-0-7 takes 400 s"))
    assert "record orders-0-7 takes 400 s" in text_of((await get("/", stuck)).text)
    waiting = ProcessView(None, status(ready=False, state="rebalancing"))
    assert "rebalancing" in text_of((await get("/", waiting)).text)


async def test_the_page_says_how_far_a_restore_is():
    page = (await get("/", ProcessView(None, RESTORING))).text
    assert '">restoring</span>' in page
    assert "orders-1 (restoring, 67,890 changelog records to go)" in text_of(page)
    assert "12,345 records so far" in text_of(page)


async def test_a_restore_of_unknown_size_is_not_said_to_be_done():
    partitions = (PartitionStatus("orders", 1, 0, None, None),)
    task = TaskStatus("orders-1", "restoring", partitions, 0.0, RestoreStatus(0, None, 0.0))
    begun = status(ready=False, tasks=(task,))
    page = (await get("/", ProcessView(None, begun))).text
    assert "orders-1 (restoring, not known yet how much)" in text_of(page)
    assert (await get("/ready", ProcessView(None, begun))).json()["reason"] == (
        "the worker is restoring task orders-1: it is not known yet how many records"
    )


async def test_the_page_of_several_processes():
    views = [ProcessView(0, status()), ProcessView(1, None, "restarting after SIGKILL")]
    text = text_of((await get("/", *views)).text)
    assert "Processes" in text
    assert "restarting after SIGKILL" in text


async def test_the_page_of_an_app_without_anything():
    empty = ProcessView(None, status(tasks=(), last_commit_age_s=None, state="starting", ready=False))
    text = text_of((await get("/", empty, shown=overview(agents=(), topics=()))).text)
    assert "none yet" in text
