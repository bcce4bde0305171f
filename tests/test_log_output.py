import asyncio
import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest

from streamflow import log_output

APP = Path("shop.py")


@pytest.fixture(autouse=True)
def logging_as_before():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)


def said(capsys, *, level="INFO", log_format="console", index=None) -> list[str]:
    log_output.configure(level, log_format, app="shop", origin=APP, process_index=index)
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
    log_output.configure("INFO", log_format, app="shop", origin=APP, secrets=["swordfish", "no"])
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
    log_output.configure("INFO", "console", app="shop", origin=APP)

    class Elsewhere(list):
        write = list.append

        def flush(self):
            pass

    elsewhere = Elsewhere()
    monkeypatch.setattr(sys, "stderr", elsewhere)
    logging.getLogger("x").warning("here")
    assert "x: here" in elsewhere[0]


LOGS = """
import logging

def say(name, level):
    logging.getLogger(name).log(level, "from %s", name)
"""


def module(path: Path):
    """A module that logs, at a place of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(LOGS)
    spec = importlib.util.spec_from_file_location("logs", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("level", ["DEBUG", "INFO"])
def test_the_level_is_for_ones_own_code_and_libraries_are_heard_from_warning_on(level, capsys, tmp_path):
    packages = tmp_path / ".venv" / "site-packages"
    own, neighbour = module(tmp_path / "shop.py"), module(tmp_path / "pricing" / "rules.py")
    library = module(packages / "httpz" / "client.py")
    log_output.configure(level, "console", app="shop", origin=tmp_path / "shop.py")
    number = getattr(logging, level)
    for where, name in ((own, "a"), (own, "root"), (neighbour, "b.c"), (library, "httpz"), (own, "low")):
        where.say(name, number - 1 if name == "low" else number)
    library.say("httpz.pool", logging.WARNING)
    asyncio.new_event_loop().close()  # says at DEBUG which selector it uses
    said = [line.rpartition("from ")[2] for line in capsys.readouterr().err.splitlines()]
    assert said == ["a", "root", "b.c", "httpz.pool"]


def test_an_installed_app_is_ones_own_code_too(capsys, tmp_path):
    packages = tmp_path / "site-packages"
    origin = packages / "shop" / "stream" / "orders.py"
    app, sibling = module(origin), module(packages / "shop" / "prices.py")
    for folder in (origin.parent, origin.parent.parent):
        (folder / "__init__.py").touch()
    other = module(packages / "shopping.py")
    log_output.configure("INFO", "console", app="shop", origin=origin)
    for number, where in enumerate((app, sibling, other)):
        where.say(f"n{number}", logging.INFO)
    assert [line.rpartition("from ")[2] for line in capsys.readouterr().err.splitlines()] == ["n0", "n1"]


def test_a_library_is_heard_where_its_logger_has_a_level(capsys, tmp_path):
    library = module(tmp_path / "site-packages" / "httpz.py")
    logging.getLogger("httpz").setLevel(logging.INFO)
    try:
        log_output.configure("INFO", "console", app="shop", origin=tmp_path / "shop.py")
        library.say("httpz.client", logging.INFO)
        library.say("httpz.client", logging.DEBUG)
    finally:
        logging.getLogger("httpz").setLevel(logging.NOTSET)
    assert capsys.readouterr().err.count("from httpz.client") == 1
