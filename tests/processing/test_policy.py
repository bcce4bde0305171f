import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow.errors import ConfigurationError
from streamflow.processing.declarations import Declarations
from streamflow.processing.policy import DeadLetter, Retry, Skip, Stop, check_policy, dead_letter_topic, policy_text

DEAD = Declarations("shop").topic("dead")


def test_policies_are_values():
    assert Stop() == Stop()
    assert Skip() != Stop()
    assert Retry(3) == Retry(3, backoff_s=0.1, max_backoff_s=30.0, then=Stop())
    assert DeadLetter(DEAD).topic is DEAD
    assert hash(Retry(3, then=Skip()))


def test_back_off_doubles_up_to_its_limit():
    retry = Retry(9, backoff_s=0.5, max_backoff_s=3)
    assert [retry.delay_s(attempt) for attempt in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert Retry(2, backoff_s=0, max_backoff_s=0).delay_s(2) == 0


@given(st.integers(1, 10**6))
def test_back_off_is_bounded_however_often(attempt):
    assert 0 < Retry(attempt).delay_s(attempt) <= 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Retry(0), r"Retry\(0\): times is how often to try again, at least 1"),
        (lambda: Retry(True), "times"),
        (lambda: Retry("3"), "times"),
        (lambda: Retry(1, backoff_s=-1), "backoff_s=-1"),
        (lambda: Retry(1, backoff_s="1"), "backoff_s='1'"),
        (lambda: Retry(1, backoff_s=2, max_backoff_s=1), r"max_backoff_s=1\): seconds, at least 2"),
        (lambda: Retry(1, max_backoff_s=float("inf")), "max_backoff_s=inf"),
        (lambda: Retry(1, then=Retry(1)), "one Retry is enough"),
        (lambda: Retry(1, then=Skip), r"write sf.Skip\(\), not the class sf.Skip"),
        (lambda: DeadLetter("dead"), "give a declared topic"),
        (lambda: check_policy(Retry, "agent 'a': on_error="), r"agent 'a': on_error=: write sf.Retry\(3\)"),
        (lambda: check_policy("skip", "here"), r"'skip' is no error policy; there are sf.Stop\(\)"),
        (lambda: check_policy(None, "here"), "None is no error policy"),
    ],
)
def test_misuse(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_policies_as_text_and_where_they_write():
    retry = Retry(3, then=DeadLetter(DEAD))
    assert policy_text(retry) == "Retry(3, then=DeadLetter(dead))"
    assert policy_text(Stop()) == "Stop()"
    assert dead_letter_topic(retry) is DEAD
    assert dead_letter_topic(DeadLetter(DEAD)) is DEAD
    assert dead_letter_topic(Retry(1)) is dead_letter_topic(Skip()) is None
