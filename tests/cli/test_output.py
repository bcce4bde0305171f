import io
import os
import signal
import sys

import anyio
import pytest

from streamflow.cli import progress as progress_module
from streamflow.cli import signals as signals_module
from streamflow.cli.banner import banner
from streamflow.cli.errors import exit_code, report, run_reporting
from streamflow.cli.lines import Lines, opened
from streamflow.cli.output import as_json, table
from streamflow.cli.progress import progress
from streamflow.cli.signals import Requests, stopping
from streamflow.error_groups import main_error
from streamflow.errors import ConfigurationError, LogUnavailableError, StreamFlowError
from streamflow.web.overview import AgentLine, Overview


def test_a_table():
    rows = [["orders", 1], ["x", None]]
    assert table(["topic", "lag"], rows, right=["lag"]) == ["TOPIC   LAG", "orders    1", "x         -"]


def test_json_of_anything():
    assert as_json({"a": 1, "b": complex(1, 2)}) == '{"a":1,"b":"(1+2j)"}'


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigurationError("no"), 2, "error: no\n"),
        (LogUnavailableError("away"), 1, "error: away\n"),
        (
            ExceptionGroup("", [ExceptionGroup("", [ConfigurationError("no")]), ConfigurationError("no")]),
            2,
            "error: no\n",
        ),
        (ExceptionGroup("", [ConfigurationError("no"), StreamFlowError("x")]), 1, "error: no\nerror: x\n"),
        (
            main_error(ExceptionGroup("", [StreamFlowError("x"), OSError("y")])),
            1,
            "error: x\nerror: and also: OSError: y\n",
        ),
    ],
)
def test_errors_of_our_own_are_one_line(error, code, text, capsys):
    assert report(error) == code
    assert capsys.readouterr().err == text


def test_other_errors_have_a_traceback_without_secrets(capsys, monkeypatch):
    monkeypatch.setenv("STREAMFLOW_KAFKA_SASL_PASSWORD", "open-sesame")

    def fail():
        raise ValueError("open-sesame")

    assert run_reporting(fail) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("ValueError: ***\n")


def test_ctrl_c():
    def interrupt():
        raise KeyboardInterrupt

    assert run_reporting(interrupt) == 130
    assert exit_code(ValueError()) == 1


# --- signals --------------------------------------------------------------------------------------------------------


def test_one_request_that_arrives_twice_is_one(monkeypatch):
    now = iter([1.0, 1.001, 1.002, 1.5])
    monkeypatch.setattr(signals_module.time, "monotonic", lambda: next(now))
    requests = Requests()
    numbers = (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM)
    assert [requests.is_first(number) for number in numbers] == [True, None, False, False]


def test_signals(monkeypatch):
    ended, asked = [], []

    def end(code: int) -> None:
        ended.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    before = signal.getsignal(signal.SIGTERM)
    with stopping(lambda: asked.append("stop")):
        os.kill(os.getpid(), signal.SIGTERM)
        assert (asked, ended) == (["stop"], [])
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGINT)
        assert (asked, ended) == (["stop"], [130])
    assert signal.getsignal(signal.SIGTERM) is before


# --- progress -------------------------------------------------------------------------------------------------------


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    now = iter([0.0, 1.0, 6.0, 7.0, 12.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(now))
    with progress("sending") as report_progress:
        for done in (10, 2000, 3000, 4000):
            report_progress(done, 5000 if done < 4000 else None)
    assert capsys.readouterr().err == "sending: 2,000 of 5,000 records\nsending: 4,000 records\n"


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("sending") as report_progress:
        report_progress(3, 4)
        print("a log line", file=sys.stderr)
    assert "3/4" in terminal.getvalue()
    assert "a log line\n" in terminal.getvalue()
    assert sys.stderr is terminal


def test_no_progress(capsys):
    with progress("sending", quiet=True) as report_progress:
        report_progress(1, 2)
    assert capsys.readouterr().err == ""


# --- lines ----------------------------------------------------------------------------------------------------------


async def read(lines: Lines) -> list[list[bytes]]:
    return [chunk async for chunk in lines.chunks()]


async def test_lines_of_a_file(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"one\r\n\ntwo\nthree")
    with opened(path) as lines:
        assert (lines.name, lines.total, lines.interactive) == (str(path), 3, False)
        assert await read(lines) == [[b"one\r", b"", b"two"], [b"three"]]


async def test_lines_of_a_pipe_come_as_they_are_written():
    read_fd, write_fd = os.pipe()
    seen: list[list[bytes]] = []

    async def take() -> None:
        async for chunk in Lines(read_fd, "pipe", None).chunks():
            seen.append(chunk)  # noqa: PERF401 - one by one is what is tested

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take)
        for text, expected in ((b"a\nb", [[b"a"]]), (b"c\n", [[b"a"], [b"bc"]])):
            os.write(write_fd, text)
            with anyio.fail_after(5):
                while seen != expected:
                    await anyio.wait_all_tasks_blocked()
        os.write(write_fd, b"rest")
        os.close(write_fd)
    os.close(read_fd)
    assert seen == [[b"a"], [b"bc"], [b"rest"]]


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigurationError, match="No such file"), opened(tmp_path / "none"):
        pass


# --- the banner -----------------------------------------------------------------------------------------------------


def test_a_large_app_has_a_bounded_banner():
    agents = [AgentLine(f"a{n}", ("in",), (), "Stop()", 1, "x.py:1") for n in range(100)]
    text = banner(Overview("shop", "1.0", "memory://", "exactly_once", "/data", agents, ["in"]), "off", 4)
    assert "processes  4" in text
    assert "and 80 more" in text
    assert len(text.splitlines()) < 40


def test_an_empty_app_has_one_too():
    text = banner(Overview("shop", "1.0", "memory://", "exactly_once", "/data", [], []), "off", None)
    assert "agents     none" in text
