import json
import logging
import sys

import pytest

from streamflow import log_output


@pytest.fixture(autouse=True)
def logging_as_before():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)


def said(capsys, *, level="INFO", log_format="console", index=None) -> list[str]:
    log_output.configure(level, log_format, app="shop", process_index=index)
    logger = logging.getLogger("streamflow.worker")
    logger.info("took %d records", 3)
    try:
        raise ValueError("bad\nvalue")
    except ValueError:
        logger.exception("it failed")
    logger.debug("not shown")
    return capsys.readouterr().err.splitlines()


def test_console_lines_are_compact(capsys):
    first, *rest = said(capsys)
    assert first.split(" ", 1)[1] == "INFO    worker: took 3 records"
    assert rest[0].endswith("ERROR   worker: it failed")
    assert rest[-1] == "value"


def test_every_console_line_has_the_process_index(capsys):
    assert all(line.startswith("[2] ") for line in said(capsys, index=2))


def test_json_lines(capsys):
    first, second = map(json.loads, said(capsys, log_format="json", index=1))
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "INFO",
        "logger": "streamflow.worker",
        "message": "took 3 records",
        "app": "shop",
        "process": 1,
    }
    assert "ValueError: bad\nvalue" in second["exc_info"]


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_secrets_never_appear(log_format, capsys, monkeypatch):
    monkeypatch.setenv("STREAMFLOW_KAFKA_SASL_PASSWORD", "open-sesame")
    log_output.configure("INFO", log_format, app="shop", secrets=["swordfish", "no"])
    try:
        raise ValueError("could not log in with open-sesame nor swordfish")
    except ValueError:
        logging.getLogger("anyone").exception("password open-sesame was refused")
    said = capsys.readouterr().err
    assert "open-sesame" not in said
    assert "swordfish" not in said
    assert said.count("***") == 5
    assert "not log in" in said


def test_it_follows_standard_error_when_that_is_replaced(capsys, monkeypatch):
    log_output.configure("INFO", "console", app="shop")

    class Elsewhere(list):
        write = list.append

        def flush(self):
            pass

    elsewhere = Elsewhere()
    monkeypatch.setattr(sys, "stderr", elsewhere)
    logging.getLogger("x").warning("here")
    assert "x: here" in elsewhere[0]


def test_libraries_are_quiet_unless_everything_is_asked_for(capsys):
    log_output.configure("INFO", "console", app="shop")
    assert logging.getLogger("aiokafka").level == logging.WARNING
    log_output.configure("DEBUG", "console", app="shop")
    assert logging.getLogger("aiokafka").level == logging.DEBUG
