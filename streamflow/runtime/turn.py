"""One agent's turn: the unit of records in its hands, and the stage that holds what it sent.

A stage is a list that is cleared, not an object per record. It joins the task's outputs when the unit is done and is
dropped when the unit failed, so an output exists only with the offset that passes its record.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from murmurhash2 import murmurhash2

from streamflow.errors import ClosedError, ProcessingError, ProductionError, TopologyError
from streamflow.log.batch import LogRecord
from streamflow.model.partitioner import POSITIVE, SEED, partition_for
from streamflow.model.record import TopicPartition
from streamflow.model.reply import HEADER_ASK_ID, HEADER_ERROR, reply_address, trace_headers
from streamflow.processing.agent import Agent, same_key
from streamflow.processing.context import Outgoing
from streamflow.processing.out import INHERIT, Out
from streamflow.processing.topic import Topic
from streamflow.runtime import births
from streamflow.runtime.births import Unit
from streamflow.runtime.derived import Copier, Processor
from streamflow.runtime.outputs import OutputPartition, Staged, Target
from streamflow.runtime.task_view import TaskView
from streamflow.runtime.turn_tables import Touched, Written
from streamflow.state.stage import PlainStage, Stage
from streamflow.state.undo import Undo

NO_HEADERS: list[tuple[str, bytes | None]] = []
NO_STAGES: Mapping[str, PlainStage] = {}


class EndOfHeaders(OutputPartition):
    """Stands first in the stage of a unit with headers; writing the stage ends what they meant.

    Args:
        turn: The turn.
    """

    __slots__ = ()

    def __init__(self, turn: Turn) -> None:
        self.count = 0

        def end(_: int, __: int, ___: bytes | None, ____: bytes | None, _____: Any) -> bool:
            if turn.replies:
                turn.answer_nothing()  # joins the stage that is being written
            turn.forget_headers()
            return True

        self.append = end


class Turn:
    """Implements `processing.context.Turn` for one agent in one task.

    Args:
        task: The task.
        agent: The agent.
    """

    def __init__(self, task: TaskView, agent: Processor) -> None:
        self.task = task
        self.agent = agent
        self.stage: list[Staged] = []
        self.record: LogRecord | None = None
        self.tp = TopicPartition("", -1)
        self.source: Topic[Any, Any] = agent.input_topics[0]
        self.unit: list[tuple[TopicPartition, LogRecord]] | None = None
        self.headers = NO_HEADERS
        self.replies: list[tuple[str, int, bytes]] = []
        # Those who have their answer in the stage: should the unit fail yet, they are told so instead.
        self._answered: list[tuple[str, int, bytes]] = []
        # Whether yields may take the short way: one record in hand, no headers to pass on, nobody asked.
        self.is_plain = True
        self._end_of_headers = EndOfHeaders(self)
        self.call: object = None
        self.has_answered = False
        self.thread_id: int | None = None
        self._loop_thread_id = threading.get_ident()
        # The asyncio task the agent runs in, and what it sees of the tables it may touch, by full name.
        self.owner: Any = None
        self.loop: Any = None
        self.stages: dict[str, Stage] = {}
        # Of these the plain ones, while the agent's own code runs: they may be touched without looking who asks.
        self.at_hand: Mapping[str, PlainStage] = NO_STAGES
        self.plain: dict[str, PlainStage] = {}
        self.undo = Undo()
        self._touched = Touched()
        # The record whose event time was read last, and that time: to read it is to decode the value once more.
        self._timed: LogRecord | None = None
        self._timed_ms = 0

    # --- what is in hand ---------------------------------------------------------------------------------------

    def in_hand(self) -> list[tuple[TopicPartition, LogRecord]]:
        """The records of the unit in hand, in order; empty between units."""
        if self.unit is not None:
            return self.unit
        return [] if self.record is None else [(self.tp, self.record)]

    def take_headers(self, record: LogRecord) -> None:
        """Look at the headers of a record that has some: trace context to pass on, an answer that is waited for."""
        if isinstance(self.agent, Copier):
            return
        self.headers = trace_headers(record.headers)
        reply = reply_address(record.headers, self.agent.name)
        if reply is not None:
            self.replies.append(reply)
        self.is_plain = False
        self.stage.append((self._end_of_headers, 0, None, None, NO_HEADERS))

    def give(self, stages: dict[str, Stage], undo: Undo) -> None:
        """Let it touch tables.

        Args:
            stages: What it sees of them, by full name.
            undo: Notes what it writes to the plain ones.
        """
        self.stages, self.undo = stages, undo
        self.plain = {name: stage for name, stage in stages.items() if isinstance(stage, PlainStage)}

    def number(self) -> int:
        """Place of the unit in hand among those of the task that are in progress at once."""
        return 0

    def touched(self, stage: Stage) -> None:
        """A table has to be looked at when the unit is over."""
        touched = self._touched.stages
        if stage not in touched:
            if not touched:
                self.stage.insert(0, (self._touched, 0, None, None, NO_HEADERS))
            touched.append(stage)

    def drop_stage(self) -> None:
        """The unit failed: it has sent and written nothing."""
        self.stage.clear()
        if self._answered:
            self.replies += self._answered
            self._answered.clear()
        if self._touched.stages:
            self._touched.drop()
        if self.undo:
            self.undo.take_out()

    def close_stage(self) -> list[Staged]:
        """Take out what a unit that is done has sent and written, to be merged later.

        Raises:
            ProductionError: A value of a table cannot be written; the unit is still open.
        """
        stage = self.stage
        if self._touched.stages:
            effects = self._touched.close()
            stage = [staged for staged in stage if staged[0] is not self._touched]
            if effects:
                stage.insert(0, (Written(effects), 0, None, None, NO_HEADERS))
        else:
            stage = list(stage)
        self.stage.clear()
        return stage

    def forget_headers(self) -> None:
        """The unit is over."""
        if self.has_answered:
            self.has_answered = False
            self.task.delivery.hurry()
        self.is_plain = True
        self.headers = NO_HEADERS
        self.replies.clear()
        self._answered.clear()

    def timestamp_ms(self) -> int:
        """Event time of the record in hand."""
        record = self.record
        if record is None:
            return self.task.clock.now_ms()
        extract = self.source.timestamp_ms_of
        if extract is None:
            return record.timestamp
        if record is not self._timed:
            try:
                self._timed_ms = extract(self.source.value_codec.decode(record.value, record.headers))
            except Exception as exc:
                raise ProcessingError(
                    f"timestamp= of topic {self.source.name!r} raised {type(exc).__name__}: {exc}"
                ) from exc
            self._timed = record
        return self._timed_ms

    # --- sending -----------------------------------------------------------------------------------------------

    def unit_in_work(self) -> Unit:
        """See `births.Worked`: after an error the same records come again in another call."""
        return self.call, self.unit if self.unit is not None else self.record

    def may_touch(self) -> bool:
        """Whether the caller works for the unit in hand: it is the agent, or a task that it waits for.

        Raises:
            ClosedError: It is a thread that the agent has started: it would read what is committed, and miss what the
                turn and those before it have written.
        """
        if threading.get_ident() not in (self.thread_id, self._loop_thread_id):
            raise ClosedError(
                f"agent {self.agent.name!r}: a table is touched from a thread that the agent has started; read it in "
                "the agent and give the thread the value, or declare the agent as a plain function with thread=True"
            )
        try:
            self.check_alive()
        except ClosedError:
            return False
        return True

    def refuse_table(self, table: Any) -> None:
        """Say that a table is not one of the agent's.

        Raises:
            TopologyError: Always, where the caller is in a turn.
        """
        if isinstance(self.agent, Copier):
            raise TopologyError(
                f"the key function of step {self.agent.name!r} ({self.agent.place}) reads table {table.name!r}, and it "
                "has the value and no table: read the table in an agent before the step, which puts what the key needs "
                "into the value or sends to a topic of that key, `yield sf.Out(value, key=...)`; or make it an "
                "`app.global_table`, which may be read anywhere"
            )
        raise TopologyError(
            f"agent {self.agent.name!r} touches table {table.name!r}, which its code does not name: declare it, "
            f"`@app.agent(..., tables=[...])`, so that the table lies where the agent runs"
        )

    def check_alive(self) -> None:
        """Check that the caller works for the unit in hand.

        Raises:
            ClosedError: It does not: the unit is done, or the caller is no task of the agent's.
        """
        call, unit = self.unit_in_work()
        if unit is not None and threading.get_ident() == self.thread_id:
            return
        caller = births.current()
        if caller is None:
            raise ClosedError(
                f"agent {self.agent.name!r}: something was sent or written from a thread or a callback of the event "
                "loop; do it in the agent itself, or from a task it awaits"
            )
        if caller is self.owner:
            if unit is not None:
                return
            raise ClosedError(
                f"agent {self.agent.name!r}: something was sent or written while it had no record in hand, so no "
                "commit could hold it; do it inside `async for`, after the record was taken"
            )
        born = births.unit_of(caller)
        if born is None or unit is None or born[0] is not call or born[1] is not unit:
            raise ClosedError(
                f"agent {self.agent.name!r}: a task that was started while an earlier record was processed sent "
                "or wrote something after that record was done; await it before asking for the next record"
            )

    def send(self, outgoing: Outgoing) -> None:
        """See `processing.context.Turn.send`."""
        self.check_alive()
        topic, key, value, partition, timestamp_ms, headers = outgoing
        at_ms = self.timestamp_ms() if timestamp_ms is None else timestamp_ms
        headers = [*self.headers, *headers]
        key_bytes = topic.key_codec.encode(key, headers)
        self.stage.append(self.task.outputs.to(topic).encode(key_bytes, value, partition, at_ms, headers))

    def refuse_ask(self, agent: Agent[Any, Any, Any]) -> None:
        """See `processing.context.Turn.refuse_ask`."""
        self.check_alive()
        if self.task.sub_topology.has_agent(agent.name):
            raise TopologyError(
                f"agent {self.agent.name!r} asks {agent.name!r}, which is of the same sub-topology: it could be asking "
                "the very task that waits for the answer. Call its function, or give it a topic of its own"
            )

    def record_key(self) -> bytes | None:
        """Encoded key of the record in hand."""
        return None if self.record is None else self.record.key

    def copy_to(self, topic: Topic[Any, Any], key: bytes | None) -> None:
        """Add a copy of the record in hand, its value and headers as they are."""
        record = self.record
        if record is None:
            raise ClosedError("there is no record in hand")
        output = self.task.outputs.to(topic)
        output.target.check_size(key, record.value, record.headers)
        timestamp_ms = self.timestamp_ms()
        output.target.check_time(timestamp_ms)
        self.stage.append((output.of_key(key), timestamp_ms, key, record.value, record.headers))

    # --- yields ------------------------------------------------------------------------------------------------

    def emitter(self) -> Callable[[Any], None]:
        """What to call with each value the agent yields or returns."""
        topics = self.agent.sink_topics
        sources = self.agent.input_topics
        if len(topics) == 1 and all(each.timestamp_ms_of is None and same_key(each, topics[0]) for each in sources):
            return self._fast_emitter(topics[0])
        return self.emit

    def emit(self, result: Any) -> None:
        """Encode a yielded value for every sink, and answer who asked."""
        if self.replies:
            self._answer(result)
        if result is None:
            return
        for topic in self.agent.sink_topics:
            self._emit_to(topic, result)

    def _emit_to(self, topic: Topic[Any, Any], result: Any) -> None:
        record = self.record
        if not isinstance(result, Out):
            out: Out[Any] = Out(result)
        else:
            out = result
        headers = [*self.headers, *out.headers]
        timestamp_ms = self.timestamp_ms() if out.timestamp_ms is INHERIT else out.timestamp_ms
        if out.key is not INHERIT:
            key = topic.key_codec.encode(out.key, headers)
        elif record is None or self.unit is not None:
            raise ProductionError(
                f"a result without a key for topic {topic.name!r}: a unit of take() has no one key to inherit; yield "
                "sf.Out(value, key=...)"
            )
        elif not same_key(self.source, topic):
            raise ProductionError(
                f"a result without a key: the keys of {self.source.name!r} ({_type_name(self.source.key_type)}) cannot "
                f"be inherited by {topic.name!r} ({_type_name(topic.key_type)}); yield sf.Out(value, key=...)"
            )
        else:
            key = record.key
        output = self.task.outputs.to(topic)
        self.stage.append(output.encode(key, out.value, out.partition, timestamp_ms, headers))

    def _fast_emitter(self, topic: Topic[Any, Any]) -> Callable[[Any], None]:
        output = self.task.outputs.to(topic)
        places, count, max_bytes = output.partitions, output.target.partitions, output.target.max_record_bytes
        of_key, is_hashed = output.of_key, output.target.partitioner is partition_for
        exact, encode = topic.value_codec.exact_type, topic.value_codec.fast_encode
        stage_append, emit = self.stage.append, self.emit
        if exact is None or encode is None or self._has_time_to_check(output.target):
            return emit

        def emit_fast(result: Any) -> None:
            record = self.record
            if type(result) is exact and self.is_plain and record is not None:
                key = record.key
                try:
                    data = encode(result)
                except Exception:
                    emit(result)  # raises what says which topic and type
                    return
                if key is not None and is_hashed:  # `partition_for`, in place
                    out, size = places[(murmurhash2(key, SEED) & POSITIVE) % count], len(key) + len(data)
                else:
                    out, size = of_key(key), len(key or b"") + len(data)
                if size <= max_bytes:
                    stage_append((out, record.timestamp, key, data, NO_HEADERS))
                    return
            emit(result)

        return emit_fast

    def _has_time_to_check(self, target: Target) -> bool:
        """Whether a source may have records of times that a sink does not take."""
        limit_ms = target.ahead_ms
        if target.behind_ms is not None:
            return True
        sources = [self.task.outputs.to(source).target for source in self.agent.input_topics]
        return limit_ms is not None and any(each.ahead_ms is None or each.ahead_ms > limit_ms for each in sources)

    # --- answers -----------------------------------------------------------------------------------------------

    def _answer(self, result: Any) -> None:
        value = result.value if isinstance(result, Out) else result
        self._reply(None if value is None else msgspec.json.encode(value), [])

    def answer_nothing(self) -> None:
        """Tell who asked that the agent finished the record without yielding."""
        text = f"AskError: agent {self.agent.name!r} finished the record without an answer (it yielded nothing)"
        self._reply(None, [(HEADER_ERROR, text.encode())])

    def answer_error(self, error: BaseException) -> None:
        """Tell who asked that the record failed."""
        if self.replies:
            cause = error.__cause__ or error
            text = f"{type(cause).__name__}: {cause}".encode(errors="backslashreplace")
            self._reply(None, [(HEADER_ERROR, text)])

    def _reply(self, data: bytes | None, headers: list[tuple[str, bytes | None]]) -> None:
        now_ms = self.task.clock.now_ms()
        for topic, partition, ask_id in self.replies:
            output = self.task.reply_output(topic)
            if output is not None and 0 <= partition < output.target.partitions:
                out = output.of_number(partition)
                self.stage.append((out, now_ms, None, data, [(HEADER_ASK_ID, ask_id), *headers]))
                self.has_answered = True
        self._answered += self.replies
        self.replies.clear()


def _type_name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))
