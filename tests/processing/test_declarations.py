import datetime
import functools
import weakref

import pytest

from streamflow.errors import ConfigurationError, RefusedError, TopologyError
from streamflow.model.record import TopicPartition
from streamflow.processing.declarations import Declarations
from streamflow.processing.hooks import BackgroundTask, Crontab, Timer


@pytest.fixture
def app():
    return Declarations("shop")


def test_an_app_is_named_hashed_and_referred_to_weakly(app):
    assert app.id == "shop"
    assert {app: 1}[app] == 1
    assert weakref.ref(app)() is app
    assert repr(app) == "<app 'shop': 0 agents, 0 topics>"


@pytest.mark.parametrize("name", ["", "a b", "ü", None, "a" * 101, ".."])
def test_a_name_that_cannot_be_part_of_a_topics_is_refused(name):
    with pytest.raises(ConfigurationError, match="app"):
        Declarations(name)


def test_timers(app):
    @app.timer(10)
    async def refresh(): ...

    @app.timer(interval_s=0.5, on_leader=True, name="other")
    def sync(): ...

    assert app.timers == [Timer("refresh", refresh, 10.0, False), Timer("other", sync, 0.5, True)]


def test_crontabs(app):
    @app.crontab("0 20 * * *", timezone="Europe/Berlin", on_leader=True)
    async def evening(): ...

    @app.crontab("*/5 * * * *")
    def often(): ...

    assert app.crontabs == [
        Crontab("evening", evening, "0 20 * * *", "Europe/Berlin", True),
        Crontab("often", often, "*/5 * * * *", "UTC", False),
    ]


def test_tasks_with_and_without_parentheses(app):
    @app.task
    async def once(): ...

    @app.task(on_leader=True, name="leader")
    def led(): ...

    assert app.tasks == [BackgroundTask("once", once, False), BackgroundTask("leader", led, True)]


def test_hooks_leave_the_function_as_it_is(app):
    @app.on_start
    async def opened(): ...

    @app.on_stop
    def closed(more=1): ...

    @app.on_assigned
    async def came(partitions: set[TopicPartition]): ...

    @app.on_revoked
    def went(partitions): ...

    assert (app.start_hooks, app.stop_hooks) == ([opened], [closed])
    assert (app.assigned_hooks, app.revoked_hooks) == ([came], [went])


def generates():
    yield 1


async def agenerates():
    yield 1


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda app: app.timer(lambda: None), "@app.timer needs its interval in seconds: @app.timer(10.0)"),
        (lambda app: app.timer(0), "@app.timer(0): seconds above 0"),
        (lambda app: app.timer("10"), "@app.timer('10')"),
        (lambda app: app.timer(True), "@app.timer(True)"),
        (lambda app: app.timer(float("inf")), "@app.timer(inf)"),
        (lambda app: app.timer(1)(generates), "generates must not yield"),
        (lambda app: app.timer(1)(agenerates), "agenerates must not yield"),
        (lambda app: app.timer(1)(3), "it decorates a function, not 3"),
        (lambda app: app.timer(1)(lambda value: None), "is called with no argument"),
        (lambda app: app.timer(1)(lambda: None), "the name of a timer, crontab or task '<lambda>'"),
        (lambda app: app.crontab(lambda: None), "@app.crontab needs an expression: for example"),
        (lambda app: app.crontab(5), "@app.crontab(5): an expression is a string"),
        (
            lambda app: app.crontab("every day"),
            "five fields are minute, hour, day of month, month, day of week; for example",
        ),
        (lambda app: app.crontab("61 * * * *"), "@app.crontab('61 * * * *')"),
        (lambda app: app.crontab("0 0 31 2 *"), "@app.crontab('0 0 31 2 *')"),
        (lambda app: app.crontab("0 0 * * *", timezone="Europe/Berln"), "did you mean 'Europe/Berlin'?"),
        (lambda app: app.crontab("0 0 * * *", timezone="../x"), "not a time zone"),
        (lambda app: app.crontab("0 0 * * *", timezone=1), "timezone=1): an IANA name"),
        (lambda app: app.task(generates), "must not yield"),
        (lambda app: app.task(int), "it decorates a function, not <class 'int'>"),
        (lambda app: app.on_start(lambda app: None), "@app.on_start: <lambda> is called with no argument"),
        (
            lambda app: app.on_assigned(lambda: None),
            "@app.on_assigned: <lambda> is called with one argument, partitions",
        ),
        (lambda app: app.on_revoked(3), "@app.on_revoked: it decorates a function, not 3"),
    ],
)
def test_misuse_says_what_to_write(app, use, message):
    with pytest.raises(RefusedError) as raised:
        use(app)
    assert message in str(raised.value)


def test_two_jobs_of_a_name_are_refused(app):
    def job(): ...

    app.timer(1)(job)
    with pytest.raises(TopologyError, match="two timers, crontabs or tasks are called 'job'"):
        app.task(job)
    app.task(name="job-2")(job)


def test_a_partial_needs_a_name(app):
    app.task(name="bound")(functools.partial(print, "a"))
    with pytest.raises(ConfigurationError):
        app.task(functools.partial(print, "a"))


def ms(text):
    return round(datetime.datetime.fromisoformat(text).timestamp() * 1000)


@pytest.mark.parametrize(
    ("expression", "zone", "after", "following"),
    [
        ("0 20 * * *", "UTC", "2024-05-01T19:59:59.999+00:00", "2024-05-01T20:00+00:00"),
        ("0 20 * * *", "UTC", "2024-05-01T20:00+00:00", "2024-05-02T20:00+00:00"),
        ("0 20 * * *", "Europe/Berlin", "2024-01-01T12:00+00:00", "2024-01-01T19:00+00:00"),
        ("0 20 * * *", "Europe/Berlin", "2024-07-01T12:00+00:00", "2024-07-01T18:00+00:00"),
        ("30 2 * * *", "Europe/Berlin", "2024-03-31T00:00+00:00", "2024-03-31T01:00+00:00"),
        ("30 2 * * *", "Europe/Berlin", "2024-10-27T00:00+00:00", "2024-10-27T00:30+00:00"),
        ("30 2 * * *", "Europe/Berlin", "2024-10-27T00:30+00:00", "2024-10-28T01:30+00:00"),
        ("*/15 * * * *", "Asia/Kolkata", "2024-05-01T00:01+00:00", "2024-05-01T00:15+00:00"),
    ],
)
def test_the_next_time_of_a_crontab(expression, zone, after, following):
    assert Crontab("job", print, expression, zone).next_ms(ms(after)) == ms(following)
