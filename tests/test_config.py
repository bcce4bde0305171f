import inspect
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamflow import config
from streamflow.app import App
from streamflow.config import TABLE, Settings, markdown_table, nearest_pyproject, resolve, resolve_for
from streamflow.errors import ConfigurationError

ROOT = Path("/srv/shop")


def settings(app=None, *, flags=None, environ=None, pyproject=None, root=ROOT, warn=None) -> Settings:
    return resolve(
        app or {},
        flags=flags,
        environ=environ or {},
        pyproject_path=pyproject,
        root=root,
        warn=warn or (lambda message: pytest.fail(message)),
    )


def refused(**sources) -> str:
    with pytest.raises(ConfigurationError) as caught:
        settings(**sources)
    return str(caught.value)


@pytest.fixture
def pyproject(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "pyproject.toml"
        path.write_text(text)
        return path

    return write


# --- precedence -----------------------------------------------------------------------------------------------------


def test_the_documented_defaults():
    assert settings() == Settings(
        broker="sqlite:////srv/shop/.streamflow/log.db",
        data_dir="/srv/shop/.streamflow",
        processing_guarantee=None,
        commit_interval_ms=100,
        auto_offset_reset="earliest",
        partitions=4,
        replication=-1,
        standby_replicas=0,
        max_warmup_replicas=2,
        acceptable_lag_records=10_000,
        rack="",
        capacity=1,
        instance_id=None,
        memory_budget_bytes=256 * 1024 * 1024,
        web=True,
        web_host="127.0.0.1",
        web_port=None,
        log_level="INFO",
        log_format="console",
        session_timeout_ms=10_000,
        heartbeat_interval_ms=300,
        rebalance_timeout_ms=60_000,
        max_poll_interval_ms=300_000,
        shutdown_timeout_s=10.0,
        start_timeout_s=30.0,
        linger_ms=5,
        compression=None,
        max_task_idle_ms=0,
    )


@pytest.mark.parametrize("strongest", ["flag", "environment", "app", "pyproject", "default"])
def test_the_strongest_source_wins(strongest, pyproject):
    order = ["flag", "environment", "app", "pyproject", "default"]
    given_by = set(order[order.index(strongest) : -1])
    resolved = settings(
        {"partitions": 12} if "app" in given_by else {},
        flags={"partitions": "14"} if "flag" in given_by else {"partitions": None},
        environ={"STREAMFLOW_PARTITIONS": "13"} if "environment" in given_by else {},
        pyproject=pyproject("[tool.streamflow]\npartitions = 11\n") if "pyproject" in given_by else None,
    )
    assert resolved.partitions == {"flag": 14, "environment": 13, "app": 12, "pyproject": 11, "default": 4}[strongest]


def test_none_and_an_empty_variable_are_not_given():
    assert (
        settings({"partitions": 7}, flags={"partitions": None}, environ={"STREAMFLOW_PARTITIONS": ""}).partitions == 7
    )


# --- names ----------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_the_nearest_one(pyproject):
    assert "'partitons'; did you mean 'partitions'?" in refused(app={"partitons": 3})
    assert "did you mean 'log_level'?" in refused(flags={"loglevel": "INFO"})
    message = refused(pyproject=pyproject("[tool.streamflow]\ncommit_interval = 3\n"))
    assert "[tool.streamflow]" in message
    assert "did you mean 'commit_interval_ms'?" in message


def test_an_unknown_name_without_a_near_one_lists_all():
    assert "known: broker, data_dir" in refused(app={"zzz": 3})


def test_an_unknown_variable_is_a_warning():
    warnings = []
    environ = {
        "STREAMFLOW_PARTITONS": "3",
        "STREAMFLOW_PORT_6066_TCP_ADDR": "10.0.0.1",
        "STREAMFLOW_KAFKA_SASL_PASSWORD": "x",
        "STREAMFLOW_PARTITIONS": "3",
        config.PROCESS: "0:1:2",
        "OTHER": "1",
    }
    settings(environ=environ, warn=warnings.append)
    assert warnings == [
        "the environment variable STREAMFLOW_PARTITONS sets nothing; did you mean STREAMFLOW_PARTITIONS?",
        "the environment variable STREAMFLOW_PORT_6066_TCP_ADDR sets nothing",
    ]


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("WEB", "0", False),
        ("WEB", "TRUE", True),
        ("WEB", "off", False),
        ("LOG_LEVEL", "debug", "DEBUG"),
        ("SHUTDOWN_TIMEOUT_S", "2.5", 2.5),
        ("SHUTDOWN_TIMEOUT_S", "3", 3.0),
        ("REPLICATION", "-1", -1),
        ("MEMORY_BUDGET_BYTES", "1_048_576", 1_048_576),
        ("COMPRESSION", "lz4", "lz4"),
        ("INSTANCE_ID", "shop-0", "shop-0"),
        ("CAPACITY", "2", 2),
    ],
)
def test_text_becomes_a_value(name, text, value):
    found = getattr(settings(environ={f"STREAMFLOW_{name}": text}), name.lower())
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("partitions", 0, "App(partitions=...) is to be a whole number from 1 to 100000, not 0"),
        ("partitions", "many", "a whole number"),
        ("partitions", 2.5, "a whole number"),
        ("partitions", True, "a whole number"),
        ("replication", 0, "-1 (the broker's default) or at least 1"),
        ("memory_budget_bytes", 5, "of at least 1048576"),
        ("shutdown_timeout_s", float("nan"), "from 0.1 to 3600"),
        ("shutdown_timeout_s", "inf", "from 0.1 to 3600"),
        ("web", "perhaps", "true or false"),
        ("compression", "rar", "'none', 'gzip', 'snappy', 'lz4' or 'zstd', not 'rar'"),
        ("processing_guarantee", "exactly-once", "'exactly_once' or 'at_least_once'"),
        ("log_level", 3, "is to be text"),
        ("data_dir", " ", "is to be text"),
        ("heartbeat_interval_ms", 10_000, "well below session_timeout_ms"),
        ("capacity", 0, "from 1 to 1000"),
        ("max_warmup_replicas", 0, "from 1 to 1000"),
        ("acceptable_lag_records", -1, "from 0 to 1000000000000000"),
        ("acceptable_lag_records", 2**70, "from 0 to 1000000000000000"),  # what is told of it has 64 bits
        ("rack", " ", "is to be text"),
        ("instance_id", "", "is to be text"),
        ("instance_id", "shop 0", "at most 249 letters, digits, '.', '_' and '-', not 'shop 0'"),
        ("instance_id", "shop-0\n", "at most 249 letters"),
        ("instance_id", "..", "at most 249 letters"),
        ("instance_id", "s" * 250, "at most 249 letters"),
        ("advertised_url", "orders-0:6066", "an address such as http://orders-0:{port}"),
        ("advertised_url", "http://", "an address such as"),
        ("advertised_url", "http://orders:port", "an address such as"),
        ("advertised_url", "https://orders/?a=b", "an address such as"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(name, value, message):
    assert message in refused(app={name: value})


def test_a_rack_may_be_taken_back_where_it_is_given_more_strongly(pyproject):
    given_there = pyproject('[tool.streamflow]\nrack = "a"\n')
    assert settings(pyproject=given_there).rack == "a"
    assert settings({"rack": ""}, pyproject=given_there).rack == ""


def test_the_message_says_where_the_value_was_given(pyproject):
    assert refused(environ={"STREAMFLOW_WEB_PORT": "x"}).startswith("STREAMFLOW_WEB_PORT is")
    assert refused(flags={"web_port": "70000"}).startswith("--web-port is")
    assert refused(pyproject=pyproject("[tool.streamflow]\nweb_port = -1\n")).startswith(
        "[tool.streamflow] web_port is"
    )


@given(st.sampled_from(sorted(TABLE)), st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.binary()))
def test_any_value_is_taken_or_refused_but_never_breaks(name, value):
    try:
        resolved = settings({name: value})
    except ConfigurationError:
        return
    assert isinstance(resolved, Settings)


@pytest.mark.parametrize("text", ["[tool\n", "[tool.streamflow]\nx = \n"])
def test_a_broken_pyproject_is_named(text, pyproject):
    path = pyproject(text)
    assert str(path) in refused(pyproject=path)


def test_a_pyproject_of_another_shape(pyproject):
    assert "is to be a table" in refused(pyproject=pyproject("[tool]\nstreamflow = 3\n"))
    assert settings(pyproject=pyproject("tool = 3\n")).partitions == 4


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_broker", "absolute"),
    [
        ("sqlite:///orders.db", "sqlite:////srv/shop/orders.db"),
        ("sqlite:///../orders.db", "sqlite:////srv/orders.db"),
        ("sqlite:////var/lib/orders.db", "sqlite:////var/lib/orders.db"),
        ("memory://", "memory://"),
        ("kafka://a:1,b:2", "kafka://a:1,b:2"),
    ],
)
def test_a_relative_broker_starts_at_the_root(given_broker, absolute):
    assert settings({"broker": given_broker}).broker == absolute


@pytest.mark.parametrize("broker", ["orders.db", "sqlite://", "sqlite:///", "sqlite://orders.db"])
def test_an_address_that_is_none_is_refused(broker):
    assert repr(broker) in refused(app={"broker": broker})


def test_a_broker_object_passes_through():
    broker = object()
    assert settings({"broker": broker}).broker is broker


def test_the_default_broker_lies_in_the_data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings({"data_dir": Path("state")}).broker == "sqlite:////srv/shop/state/log.db"
    assert settings({"data_dir": "~/state"}).data_dir == str(tmp_path / "state")
    assert settings({"data_dir": "/var/lib/shop"}).broker == "sqlite:////var/lib/shop/log.db"


def test_paths_start_at_the_nearest_pyproject_else_at_the_app(tmp_path):
    app = tmp_path / "project" / "shop" / "orders.py"
    app.parent.mkdir(parents=True)
    app.touch()
    assert nearest_pyproject(app) is None
    assert resolve_for({}, origin=app, environ={}).data_dir == str(app.parent / ".streamflow")
    (tmp_path / "project" / "pyproject.toml").write_text("[tool.streamflow]\npartitions = 3\n")
    found = resolve_for({}, origin=app, environ={})
    assert (found.data_dir, found.partitions) == (str(tmp_path / "project" / ".streamflow"), 3)


# --- one table ------------------------------------------------------------------------------------------------------


def test_app_takes_every_setting_by_keyword_and_no_other():
    parameters = inspect.signature(App).parameters
    keywords = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    assert keywords == list(TABLE)
    assert all(parameters[name].default is None for name in keywords)


def test_every_setting_is_documented_where_apps_are_made():
    documentation = inspect.getdoc(App) or ""
    assert [name for name in TABLE if f"    {name}: " not in documentation] == []


def test_the_table_names_variables_and_flags():
    assert TABLE["commit_interval_ms"].variable == "STREAMFLOW_COMMIT_INTERVAL_MS"
    assert TABLE["commit_interval_ms"].flag == "--commit-interval-ms"
    assert all(f"| `{name}` |" in markdown_table() for name in TABLE)
