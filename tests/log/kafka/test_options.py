import logging
import pickle
import ssl

import pytest

from streamflow.errors import ConfigurationError
from streamflow.log.kafka.options import Kafka, parse_servers

SECRET = "do-not-tell-anybody"


async def token() -> str:
    return SECRET


def secretive() -> list[Kafka]:
    sasl = {"sasl_mechanism": "PLAIN", "sasl_username": "ann", "sasl_password": SECRET}
    return [
        Kafka(servers="h:1", security_protocol="SASL_PLAINTEXT", **sasl),
        Kafka(servers="h:1", security_protocol="SASL_SSL", ssl_password=SECRET, **sasl),
        Kafka(servers="h:1", security_protocol="SASL_SSL", sasl_mechanism="OAUTHBEARER", sasl_token=token),
    ]


@pytest.mark.parametrize(
    ("servers", "expected"),
    [
        ("h:1", [("h", 1)]),
        ("h", [("h", 9092)]),
        ("h:1, h2:2", [("h", 1), ("h2", 2)]),
        ("127.0.0.1:65535", [("127.0.0.1", 65535)]),
        ("[::1]:9", [("::1", 9)]),
        ("[::1]", [("::1", 9092)]),
    ],
)
def test_servers(servers, expected):
    assert parse_servers(servers) == expected


@pytest.mark.parametrize("servers", ["", "h:", "h:x", ":1", "h:0", "h:70000", "h:1,,h:2", "h:1/x", "::1:9092:", "[::1"])
def test_what_is_no_server_is_refused_with_what_to_write(servers):
    with pytest.raises(ConfigurationError, match=r"HOST:PORT|1 to 65535"):
        parse_servers(servers)


def test_an_address_is_parsed_and_printed():
    options = Kafka.parse("kafka://h:1,[::1]:2/")
    assert options.address == "kafka://h:1,[::1]:2"


def test_an_address_with_a_password_is_refused_without_repeating_it():
    with pytest.raises(ConfigurationError) as info:
        Kafka.parse(f"kafka://ann:{SECRET}@h:1")
    assert "sasl_password" in str(info.value)
    assert SECRET not in str(info.value)


@pytest.mark.parametrize("options", secretive(), ids=lambda options: options.sasl_mechanism)
def test_secrets_do_not_show(options, caplog):
    caplog.set_level(logging.DEBUG)
    logging.getLogger("any").debug("%s %r %s", options, options, {"kafka": options})
    assert SECRET not in repr(options) + str(options) + f"{options}" + options.address + caplog.text
    assert SECRET not in str(ConfigurationError(options))


def test_the_environment_sets_every_option_but_objects(tmp_path):
    authority = tmp_path / "ca.pem"
    authority.write_text("")
    env = {
        "STREAMFLOW_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "STREAMFLOW_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
        "STREAMFLOW_KAFKA_SASL_USERNAME": "ann",
        "STREAMFLOW_KAFKA_SASL_PASSWORD": SECRET,
        "STREAMFLOW_KAFKA_SSL_CAFILE": str(authority),
        "STREAMFLOW_KAFKA_REQUEST_TIMEOUT_MS": "1234",
        "STREAMFLOW_KAFKA_SERVERS": "elsewhere:1",
        "UNRELATED": "x",
    }
    options = Kafka.from_environment("kafka://h:1", env)
    assert options.servers == "h:1"
    assert (options.security_protocol, options.sasl_mechanism) == ("SASL_SSL", "SCRAM-SHA-512")
    assert (options.sasl_username, options.sasl_password) == ("ann", SECRET)
    assert options.request_timeout_ms == 1234
    assert Kafka.from_environment("h:1", {}) == Kafka(servers="h:1")


def test_a_number_that_is_none_is_refused():
    with pytest.raises(ConfigurationError, match="STREAMFLOW_KAFKA_REQUEST_TIMEOUT_MS must be a whole number"):
        Kafka.from_environment("h:1", {"STREAMFLOW_KAFKA_REQUEST_TIMEOUT_MS": "soon"})


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"security_protocol": "TLS"}, "PLAINTEXT, SSL, SASL_PLAINTEXT, SASL_SSL"),
        ({"sasl_username": "ann"}, "security_protocol='SASL_SSL'"),
        ({"security_protocol": "SASL_SSL"}, "PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, OAUTHBEARER"),
        ({"security_protocol": "SASL_SSL", "sasl_mechanism": "PLAIN", "sasl_username": "a"}, "sasl_password"),
        ({"security_protocol": "SASL_SSL", "sasl_mechanism": "OAUTHBEARER"}, "sasl_token"),
        ({"ssl_cafile": "/nowhere.pem"}, "security_protocol='SSL'"),
        ({"security_protocol": "SSL", "ssl_cafile": "/nowhere.pem"}, "names no file: /nowhere.pem"),
        (
            {"security_protocol": "SSL", "ssl_cafile": "x", "ssl_context": ssl.create_default_context()},
            "ssl_context or ssl_cafile",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_with_what_to_write(options, what):
    with pytest.raises(ConfigurationError) as info:
        Kafka(servers="h:1", **options)
    assert what in str(info.value)


def test_a_file_that_is_no_certificate_is_refused(tmp_path):
    path = tmp_path / "ca.pem"
    path.write_text("no certificate")
    with pytest.raises(ConfigurationError, match=r"ca\.pem"):
        Kafka(servers="h:1", security_protocol="SSL", ssl_cafile=str(path)).make_ssl_context()


def test_options_can_be_handed_to_a_child_process():
    options = Kafka(servers="h:1", request_timeout_ms=1234)
    assert pickle.loads(pickle.dumps(options)) == options
