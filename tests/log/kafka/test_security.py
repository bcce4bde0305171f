"""TLS and SASL against the real broker; secrets stay out of every text."""

import asyncio
import base64
import json
import logging
import time

import pytest

from streamflow.errors import AuthorizationError, ConfigurationError, LogUnavailableError
from streamflow.log.api import AtomicCommit, GroupSettings, Membership, NewTopic, OffsetMark
from streamflow.log.kafka import wire
from streamflow.log.kafka.log import KafkaLog
from streamflow.log.kafka.options import Kafka
from streamflow.log.kafka.wire import ERROR, THROTTLE, Int8, S, Schema, each
from streamflow.model.record import TopicPartition
from tests.contracts.records import Watched, batch, read_to, receive, spread, until, values
from tests.kafka import certificates
from tests.kafka.broker import (
    PLAIN_PASSWORD,
    PLAIN_USER,
    POWERLESS_PASSWORD,
    POWERLESS_USER,
    SCRAM_PASSWORD,
    SCRAM_USER,
    Broker,
)
from tests.kafka.fixtures import unavailable
from tests.kafka.jars import JarsMissingError

pytestmark = pytest.mark.kafka

WRONG = "a-wrong-but-secret-password"


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return certificates.make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def secure(tmp_path_factory, tls):
    try:
        broker = Broker(tmp_path_factory.mktemp("kafka-secure"), certificates=tls)
    except JarsMissingError as error:
        unavailable(str(error))
        raise
    with broker:
        yield broker


def unsecured_token() -> str:
    """A JWS without a signature: what the broker's development validator takes."""

    def part(fields):
        return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode().rstrip("=")

    now = int(time.time())
    return f"{part({'alg': 'none'})}.{part({'sub': 'ann', 'iat': now - 5, 'exp': now + 600})}."


async def token() -> str:
    return unsecured_token()


async def wrong_token() -> str:
    return WRONG


SASL = {
    "SCRAM-SHA-256": {"sasl_username": SCRAM_USER, "sasl_password": SCRAM_PASSWORD},
    "SCRAM-SHA-512": {"sasl_username": SCRAM_USER, "sasl_password": SCRAM_PASSWORD},
    "PLAIN": {"sasl_username": PLAIN_USER, "sasl_password": PLAIN_PASSWORD},
    "OAUTHBEARER": {"sasl_token": token},
}


async def use(options, name):
    """Write, read, be a member of a group: every kind of connection."""
    tp = TopicPartition(name("t"), 0)
    async with KafkaLog(options, client_id="test") as log:
        await log.admin.create([NewTopic(tp.topic, 1)])
        async with log.producer() as producer, log.reader("source") as reader:
            await (await producer.enqueue(tp, batch(b"x")))
            reader.add(tp, 0)
            assert values(await read_to(reader, tp, 1)) == [b"x"]
        settings = GroupSettings(session_timeout_ms=6000)
        async with log.group(name("g"), frozenset({tp.topic}), spread, settings) as group, Watched(group) as member:
            await until(lambda: member.owned == {tp})


@pytest.mark.parametrize("mechanism", SASL)
async def test_sasl_over_tls(secure, tls, name, mechanism, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    options = Kafka(
        servers=secure.listener("SASL_SSL"),
        security_protocol="SASL_SSL",
        ssl_cafile=str(tls.authority),
        sasl_mechanism=mechanism,
        **SASL[mechanism],
    )
    await use(options, name)
    output = capfd.readouterr()
    told = caplog.text + output.out + output.err + repr(options)
    for secret in (SCRAM_PASSWORD, PLAIN_PASSWORD, unsecured_token().split(".")[0], "n,,n=ann", ",p="):
        assert secret not in told
    assert "SaslAuthenticateRequest" in told  # the debug log was on, and shows what it may


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256"])
async def test_sasl_without_tls(secure, name, mechanism):
    servers = secure.listener("SASL_PLAINTEXT")
    await use(
        Kafka(servers=servers, security_protocol="SASL_PLAINTEXT", sasl_mechanism=mechanism, **SASL[mechanism]), name
    )


async def test_mutual_tls_by_files(secure, tls, name):
    await use(
        Kafka(
            servers=secure.listener("SSL"),
            security_protocol="SSL",
            ssl_cafile=str(tls.authority),
            ssl_certfile=str(tls.client_certificate),
            ssl_keyfile=str(tls.client_key),
            ssl_password=tls.client_key_password,
        ),
        name,
    )


async def test_mutual_tls_by_a_context(secure, tls, name):
    context = Kafka(
        servers="h:1", security_protocol="SSL", ssl_cafile=str(tls.authority), ssl_certfile=str(tls.client)
    ).make_ssl_context()
    await use(Kafka(servers=secure.listener("SSL"), security_protocol="SSL", ssl_context=context), name)


async def test_the_environment_is_enough(secure, tls, name):
    env = {
        "STREAMFLOW_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "STREAMFLOW_KAFKA_SSL_CAFILE": str(tls.authority),
        "STREAMFLOW_KAFKA_SASL_MECHANISM": "SCRAM-SHA-256",
        "STREAMFLOW_KAFKA_SASL_USERNAME": SCRAM_USER,
        "STREAMFLOW_KAFKA_SASL_PASSWORD": SCRAM_PASSWORD,
    }
    await use(Kafka.from_environment(f"kafka://{secure.listener('SASL_SSL')}", env), name)


async def refused(options, caplog) -> str:
    """What connecting says, in every text a person or a log gets to see."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ConfigurationError) as info:
        async with KafkaLog(options, client_id="test"):
            pass
    chain, error = [], info.value
    while error is not None:
        chain.append(repr(error))
        error = error.__cause__
    return str(info.value) + " ".join(chain) + caplog.text


@pytest.mark.parametrize(
    ("mechanism", "credentials"),
    [
        ("SCRAM-SHA-256", {"sasl_username": SCRAM_USER, "sasl_password": WRONG}),
        ("PLAIN", {"sasl_username": PLAIN_USER, "sasl_password": WRONG}),
        ("OAUTHBEARER", {"sasl_token": wrong_token}),
    ],
)
async def test_wrong_credentials_are_refused_without_repeating_them(secure, tls, caplog, mechanism, credentials):
    options = Kafka(
        servers=secure.listener("SASL_SSL"),
        security_protocol="SASL_SSL",
        ssl_cafile=str(tls.authority),
        sasl_mechanism=mechanism,
        **credentials,
    )
    told = await refused(options, caplog)
    assert "refused the credentials" in told
    assert WRONG not in told


async def test_a_token_function_that_fails_is_named_without_what_it_says(secure, tls, caplog):
    async def failing() -> str:
        raise ValueError(WRONG)

    options = Kafka(
        servers=secure.listener("SASL_SSL"),
        security_protocol="SASL_SSL",
        ssl_cafile=str(tls.authority),
        sasl_mechanism="OAUTHBEARER",
        sasl_token=failing,
    )
    with pytest.raises(LogUnavailableError, match=r"sasl_token\(\) raised ValueError") as info:
        async with KafkaLog(options, client_id="test"):
            pass
    assert WRONG not in str(info.value) + caplog.text


async def test_an_unknown_authority_is_said(secure, caplog):
    options = Kafka(servers=secure.listener("SSL"), security_protocol="SSL")
    assert "certificate is not trusted" in await refused(options, caplog)


async def test_a_missing_client_certificate_is_said(secure, tls, caplog):
    options = Kafka(servers=secure.listener("SSL"), security_protocol="SSL", ssl_cafile=str(tls.authority))
    assert "TLS failed" in await refused(options, caplog)


async def test_what_a_user_may_not_do_is_named(secure, name):
    topic, group_id = name("t"), name("g")
    tp = TopicPartition(topic, 0)
    async with KafkaLog(Kafka(servers=secure.bootstrap), client_id="test") as log:
        await log.admin.create([NewTopic(topic, 1)])
    options = Kafka(
        servers=secure.listener("SASL_PLAINTEXT"),
        security_protocol="SASL_PLAINTEXT",
        sasl_mechanism="PLAIN",
        sasl_username=POWERLESS_USER,
        sasl_password=POWERLESS_PASSWORD,
    )
    async with KafkaLog(options, client_id="test") as log:
        with pytest.raises(AuthorizationError, match=f"describe topic {topic}.*TOPIC_AUTHORIZATION_FAILED"):
            await log.admin.describe([topic])
        with pytest.raises(AuthorizationError, match=f"create topic {name('new')}"):
            await log.admin.create([NewTopic(name("new"), 1)])
        with pytest.raises(AuthorizationError, match=f"group {group_id}"):
            await log.admin.group_offsets(group_id)
        async with log.reader("source") as reader:
            reader.add(tp, 0)
            reader.ask(tp)
            (fetched,) = await receive(reader)
            assert isinstance(fetched.error, AuthorizationError)
            assert str(fetched.error).startswith(f"read {tp}: ")
        async with log.producer() as producer:
            with pytest.raises(AuthorizationError, match=f"write to {tp}"):
                await (await producer.enqueue(tp, batch(b"x")))
        with pytest.raises(AuthorizationError, match=f"{name('x')}.*Write and Describe on the transactional id"):
            await log.admin.fence_producer(name("x"))
        async with log.group(group_id, frozenset({topic}), spread, GroupSettings()) as group:
            with pytest.raises(AuthorizationError, match=f"{group_id}.*GROUP_AUTHORIZATION_FAILED"):
                async with asyncio.timeout(10):
                    await group.next_event()


CREATE_ACLS = wire.Api(
    "CreateAcls",
    30,
    1,
    Schema(
        (
            "acls",
            each(
                ("kind", Int8),
                ("name", S),
                ("pattern", Int8),
                ("principal", S),
                ("host", S),
                ("operation", Int8),
                ("permission", Int8),
            ),
        )
    ),
    Schema(THROTTLE, ("results", each(ERROR, ("message", S)))),
)
TOPIC, GROUP, TRANSACTIONAL_ID = 2, 3, 5
READ, WRITE, DESCRIBE = 3, 4, 8


async def grant(log, kind, resource, *operations):
    await log._client.refresh()
    acls = [(kind, resource, 3, f"User:{POWERLESS_USER}", "*", operation, 3) for operation in operations]
    response = await log._client.send(log._client.controller_node(), CREATE_ACLS(acls))
    assert [code for code, _ in response.results] == [0] * len(acls)


async def until_allowed(attempt):
    """ACLs come into force a moment later."""
    async with asyncio.timeout(10):
        while True:
            try:
                return await attempt()
            except AuthorizationError:
                await asyncio.sleep(0.05)


async def test_a_missing_acl_of_a_transaction_is_named_and_nothing_is_stored(secure, name):
    tp, source, transactional_id = TopicPartition(name("t"), 0), TopicPartition(name("s"), 0), name("x")
    powerless = Kafka(
        servers=secure.listener("SASL_PLAINTEXT"),
        security_protocol="SASL_PLAINTEXT",
        sasl_mechanism="PLAIN",
        sasl_username=POWERLESS_USER,
        sasl_password=POWERLESS_PASSWORD,
    )
    async with (
        KafkaLog(Kafka(servers=secure.bootstrap), client_id="test") as all_powerful,
        KafkaLog(powerless, client_id="test") as log,
    ):
        await all_powerful.admin.create([NewTopic(topic, 1) for topic in (tp.topic, source.topic)])
        opening = log.transactional_producer(transactional_id)
        with pytest.raises(AuthorizationError, match=f"{transactional_id}.*Write and Describe on the transactional id"):
            await opening.__aenter__()
        await grant(all_powerful, TRANSACTIONAL_ID, transactional_id, DESCRIBE, WRITE)
        await until_allowed(opening.__aenter__)
        async with opening as producer:
            outputs = AtomicCommit([(tp, batch(b"x"))], {}, None)
            await grant(all_powerful, TOPIC, tp.topic, DESCRIBE)
            await until_allowed(lambda: log._client.leaders([tp]))
            with pytest.raises(AuthorizationError, match=f"write to .*{tp.topic}.*Write to write to it"):
                await producer.commit(outputs)
            await grant(all_powerful, TOPIC, tp.topic, WRITE)
            await until_allowed(lambda: producer.commit(outputs))
            membership = Membership(name("g"), "somebody", 1)
            with pytest.raises(AuthorizationError, match=f"group {membership.group_id}.*Read on the group"):
                await producer.commit(AtomicCommit(outputs.outputs, {source: OffsetMark(1)}, membership))
        async with all_powerful.reader("check") as reader:
            reader.add(tp, 0)
            end = (await all_powerful.admin.high_watermarks([tp]))[tp]
            assert values(await read_to(reader, tp, end)) == [b"x"]


def test_a_wrong_key_password_is_said_and_not_repeated(tls):
    options = Kafka(
        servers="h:1",
        security_protocol="SSL",
        ssl_certfile=str(tls.client_certificate),
        ssl_keyfile=str(tls.client_key),
        ssl_password=WRONG,
    )
    with pytest.raises(ConfigurationError, match="ssl_password") as info:
        options.make_ssl_context()
    assert WRONG not in repr(info.value) + repr(info.value.__cause__)
