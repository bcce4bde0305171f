"""What members say to the assignor, what it tells them, and how a new round is asked for; on every log."""

import asyncio
import threading
from contextlib import asynccontextmanager

from streamflow.log.api import Assigned, Given, GroupSettings, NewTopic, Revoked, Told
from streamflow.model.record import TopicPartition
from tests.contracts.records import Watched, spread, until

SETTINGS = GroupSettings(session_timeout_ms=10_000, heartbeat_interval_ms=100)


class Teller:
    """An assignor that keeps what it heard, and tells everybody what it was set to and what all others said."""

    def __init__(self):
        self.tells = b""
        self.rounds = []

    def __call__(self, members, counts):
        self.rounds.append({member.says for member in members})
        heard = b",".join(sorted(member.says for member in members))
        told = self.tells and self.tells + b":" + heard
        return {one: Given(given.partitions, told) for one, given in spread(members, counts).items()}


@asynccontextmanager
async def member(log, group_id, topic, teller, says=b"", settings=SETTINGS, **watching):
    async with (
        log.group(group_id, frozenset({topic}), teller, settings, says) as group,
        Watched(group, **watching) as watched,
    ):
        yield watched


def told(watched):
    return [event.told for event in watched.events if isinstance(event, Told)]


async def test_the_assignor_hears_what_each_member_said_and_each_is_told_what_it_answers(open_log, name):
    topic, group_id, teller = name("t"), name("g"), Teller()
    teller.tells = b"1"
    async with open_log() as log, open_log() as other:
        await log.admin.create([NewTopic(topic, 2)])
        async with member(log, group_id, topic, teller, b"\x00first") as first:
            await until(lambda: len(first.owned) == 2)
            assert told(first) == [b"1:\x00first"]
            async with member(other, group_id, topic, teller, b"second\xff") as second:
                await until(lambda: first.owned and second.owned)
                await until(lambda: told(second)[-1:] == told(first)[-1:] == [b"1:\x00first,second\xff"])
    assert {b"\x00first"} in teller.rounds


async def test_of_one_round_what_goes_is_said_first_then_what_is_told_then_what_comes(open_log, name):
    topic, group_id, teller = name("t"), name("g"), Teller()
    teller.tells = b"1"
    async with open_log() as log, open_log() as other:
        await log.admin.create([NewTopic(topic, 2)])
        async with member(log, group_id, topic, teller, b"a") as first:
            await until(lambda: len(first.owned) == 2)
            assert [type(event) for event in first.events] == [Told, Assigned]
            assert first.events[0].generation == first.events[1].generation
            async with member(other, group_id, topic, teller, b"b") as second:
                await until(lambda: second.owned)
                assert [type(event) for event in first.events[2:4]] == [Revoked, Told]
                assert [type(event) for event in second.events[-2:]] == [Told, Assigned]
                assert first.events[3].generation > first.events[0].generation


async def test_nobody_is_told_what_it_was_told_before(open_log, name):
    topic, group_id, teller = name("t"), name("g"), Teller()
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1)])
        async with member(log, group_id, topic, teller) as only:
            await until(lambda: only.owned)
            await ask(only, teller)
            assert told(only) == []  # nothing, after nothing
            teller.tells = b"1"
            await ask(only, teller)
            await until(lambda: told(only) == [b"1:"])
            await ask(only, teller)
            teller.tells = b""
            await ask(only, teller)
            await until(lambda: told(only) == [b"1:", b""])


async def ask(watched, teller):
    """A round that is asked for, to its end."""
    before, generation = len(teller.rounds), watched.group.membership.generation
    watched.group.rejoin("the test wants it")
    await until(lambda: len(teller.rounds) > before)
    await until(lambda: watched.group.membership.generation > generation)
    await asyncio.sleep(0.05)


async def test_what_is_said_meanwhile_is_heard_with_the_next_round_and_asks_for_none(open_log, name):
    topic, group_id, teller = name("t"), name("g"), Teller()
    teller.tells = b"1"
    async with open_log() as log, open_log() as other:
        await log.admin.create([NewTopic(topic, 2)])
        async with (
            member(log, group_id, topic, teller, b"a") as first,
            member(other, group_id, topic, teller, b"b") as second,
        ):
            await until(lambda: first.owned and second.owned and told(first)[-1:] == [b"1:a,b"])
            await asyncio.sleep(0.5)
            rounds = len(teller.rounds)
            first.group.say(b"aa")
            second.group.say(b"c")
            second.group.say(b"bb")
            await asyncio.sleep(1)
            assert len(teller.rounds) == rounds
            owned = set(first.owned), set(second.owned)
            second.group.rejoin("it has caught up")  # which need not be the one that leads
            await until(lambda: told(first)[-1] == told(second)[-1] == b"1:aa,bb")
            first.group.say(b"aaa")
            first.group.rejoin("it has caught up, too")
            await until(lambda: told(first)[-1] == told(second)[-1] == b"1:aaa,bb")
            assert (first.owned, second.owned) == owned  # a round that moves nothing


async def test_asking_many_times_at_once_from_any_thread_is_asking_once_or_twice(open_log, name):
    topic, group_id, teller = name("t"), name("g"), Teller()
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1)])
        async with member(log, group_id, topic, teller) as only:
            await until(lambda: only.owned)
            before = len(teller.rounds)

            def ask_often():
                for number in range(50):
                    only.group.say(b"%d" % number)
                    only.group.rejoin(f"reason {number}")

            thread = threading.Thread(target=ask_often)
            thread.start()
            thread.join()
            await until(lambda: teller.rounds[-1] == {b"49"} and len(teller.rounds) > before)
            await asyncio.sleep(1)
            assert before < len(teller.rounds) <= before + 3


async def test_a_member_that_lost_its_membership_is_told_anew(open_log, name):
    topic, group_id, teller = name("t"), name("g"), Teller()
    teller.tells = b"1"
    impatient = GroupSettings(session_timeout_ms=10_000, heartbeat_interval_ms=100, max_poll_interval_ms=800)
    async with open_log() as log:
        await log.admin.create([NewTopic(topic, 1)])
        async with member(log, group_id, topic, teller, b"a", impatient) as only:
            await until(lambda: told(only) == [b"1:a"], doing=only.group.report_progress)
            await until(lambda: not only.owned)
            await until(lambda: told(only) == [b"1:a", b"1:a"], doing=only.group.report_progress)
            await until(lambda: only.owned == {TopicPartition(topic, 0)}, doing=only.group.report_progress)
