"""A mistyped keyword of a declaration is answered with the one that was meant."""

import inspect
import pickle
from dataclasses import replace
from typing import Any

import pytest

import streamflow as sf

app: Any = sf.App("keywords")
MISTYPED = {
    "topic": (lambda: app.topic("a", valuetype=str), "app.topic(...) has no argument 'valuetype'", "value_type"),
    "agent": (lambda: app.agent(concurency=4), "@app.agent(...) has no argument 'concurency'", "concurrency"),
    "timer": (lambda: app.timer(1, onleader=True), "@app.timer(...) has no argument 'onleader'", "on_leader"),
    "crontab": (lambda: app.crontab("* * * * *", timezon="UTC"), "@app.crontab(...) has no", "timezone"),
    "task": (lambda: app.task(on_leeder=True), "@app.task(...) has no argument 'on_leeder'", "on_leader"),
    "table": (lambda: app.table("t", defualt=int), "app.table(...) has no argument 'defualt'", "default"),
    "set_table": (lambda: app.set_table("t", membertype=int), "app.set_table(...) has no argument", "member_type"),
    "global_table": (lambda: app.global_table("t", sources=1), "app.global_table(...) has no argument", "source"),
    "Retry": (lambda: sf.Retry(time=3), "sf.Retry(...) has no argument 'time'", "times"),  # type: ignore[call-arg]
    "DeadLetter": (lambda: sf.DeadLetter(topics=1), "sf.DeadLetter(...) has no", "topic"),  # type: ignore[call-arg]
    "Kafka": (lambda: sf.Kafka(server="b:9092"), "sf.Kafka(...) has no", "servers"),  # type: ignore[call-arg]
}


@pytest.mark.parametrize("name", MISTYPED)
def test_a_mistyped_keyword_is_answered_with_the_nearest(name: str) -> None:
    declare, message, meant = MISTYPED[name]
    with pytest.raises(sf.ConfigurationError) as caught:
        declare()
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(f"; did you mean {meant!r}?")


def test_a_keyword_that_is_near_to_none_is_answered_with_all() -> None:
    with pytest.raises(sf.ConfigurationError, match=r"known: interval_s, on_leader, name$"):
        app.timer(1, zzz=2)
    for policy in (sf.Stop, sf.Skip):
        with pytest.raises(sf.ConfigurationError, match=rf"sf.{policy.__name__}\(...\) has no argument 'after'$"):
            policy(after=3)  # type: ignore[call-arg]


def test_positional_names_are_no_keywords() -> None:
    with pytest.raises(sf.ConfigurationError, match="no argument 'source'"):
        app.agent(source=None)


def test_what_is_declared_rightly_is_as_it_was() -> None:
    retry = sf.Retry(3, backoff_s=0.5)
    assert replace(retry, times=4) == sf.Retry(times=4, backoff_s=0.5)
    assert pickle.loads(pickle.dumps(retry)) == retry
    assert list(inspect.signature(sf.App.timer).parameters) == ["self", "interval_s", "on_leader", "name"]
    table = inspect.signature(sf.App.table).parameters
    assert list(table)[:2] == ["self", "name"]
    assert {"key_type", "default", "source", "help"} < table.keys()
    assert not {"app", "options"} & table.keys()
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'times'"):
        sf.Retry()  # type: ignore[call-arg]
    topic = app.topic("placed")
    assert topic.place.startswith(__file__)
