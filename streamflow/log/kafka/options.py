"""`sf.Kafka(...)`: where the brokers are, how to authenticate, how the client behaves."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

from streamflow.errors import ConfigurationError
from streamflow.keywords import known_keywords

TokenFunction: TypeAlias = Callable[[], Awaitable[str]]

PROTOCOLS: Final = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
MECHANISMS: Final = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")
ENVIRONMENT_PREFIX: Final = "STREAMFLOW_KAFKA_"
_DEFAULT_PORT: Final = 9092
_NOT_IN_ENVIRONMENT: Final = ("servers", "ssl_context", "sasl_token")


@known_keywords("sf.Kafka(...)")
@dataclass(frozen=True, slots=True, kw_only=True)
class Kafka:
    """Options of a Kafka cluster. Secrets never show in `repr`, logs or errors.

    Args:
        servers: `host:port[,host:port]`; any of them leads to the whole cluster.
        security_protocol: `PLAINTEXT`, `SSL`, `SASL_PLAINTEXT` or `SASL_SSL`.
        ssl_cafile: PEM file of the authorities to trust; default: the system's.
        ssl_certfile: PEM file of this client's certificate (mutual TLS).
        ssl_keyfile: PEM file of its key, where it is not in `ssl_certfile`.
        ssl_password: Password of the key.
        ssl_context: A ready context instead of the four above.
        sasl_mechanism: `PLAIN`, `SCRAM-SHA-256`, `SCRAM-SHA-512` or `OAUTHBEARER`.
        sasl_username: User name for PLAIN and SCRAM.
        sasl_password: Password for PLAIN and SCRAM.
        sasl_token: `async def token() -> str` for OAUTHBEARER, called for every new connection, also from the
            control thread: it must not be bound to one event loop.
        connect_timeout_ms: For one connection, authentication included.
        request_timeout_ms: For one answer; a connection without one is closed.
        metadata_max_age_ms: How often a group looks for new partitions.
        fetch_max_wait_ms: How long the broker may wait for new records.
        fetch_max_bytes: Of one fetch response.
        fetch_max_partition_bytes: Of one partition in it.
        producer_buffer_bytes: Memory for batches not yet acknowledged; `enqueue` waits beyond it.
        transaction_timeout_ms: After this time the cluster aborts a transaction, so that a worker that hangs in one
            does not hold up the readers of its outputs; at most the brokers' `transaction.max.timeout.ms`.

    Raises:
        ConfigurationError: Options that do not go together; the message says what to write.
    """

    servers: str
    security_protocol: str = "PLAINTEXT"
    ssl_cafile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_password: str | None = field(default=None, repr=False)
    ssl_context: ssl.SSLContext | None = field(default=None, repr=False)
    sasl_mechanism: str | None = None
    sasl_username: str | None = None
    sasl_password: str | None = field(default=None, repr=False)
    sasl_token: TokenFunction | None = field(default=None, repr=False)
    connect_timeout_ms: int = 10_000
    request_timeout_ms: int = 30_000
    metadata_max_age_ms: int = 60_000
    fetch_max_wait_ms: int = 500
    fetch_max_bytes: int = 8 << 20
    fetch_max_partition_bytes: int = 1 << 18
    producer_buffer_bytes: int = 32 << 20
    transaction_timeout_ms: int = 10_000

    def __post_init__(self) -> None:
        parse_servers(self.servers)
        _one_of("security_protocol", self.security_protocol, PROTOCOLS)
        self._check_sasl()
        self._check_ssl()

    @classmethod
    def parse(cls, address: str) -> Kafka:
        """Read `kafka://HOST:PORT[,HOST:PORT]`.

        Raises:
            ConfigurationError: The address is malformed, or holds a user name or password.
        """
        return cls(servers=address.removeprefix("kafka://").rstrip("/"))

    @classmethod
    def from_environment(cls, servers: str, env: Mapping[str, str]) -> Kafka:
        """Options from `STREAMFLOW_KAFKA_<OPTION>` variables, for example `STREAMFLOW_KAFKA_SASL_PASSWORD`.

        Args:
            servers: As in `servers`, or a `kafka://` address.
            env: For example `os.environ`.

        Raises:
            ConfigurationError: A number is none, or options do not go together.
        """
        options: dict[str, Any] = {}
        for option in fields(cls):
            text = env.get(ENVIRONMENT_PREFIX + option.name.upper())
            if text is None or option.name in _NOT_IN_ENVIRONMENT:
                continue
            options[option.name] = _number(option.name, text) if option.name.endswith(("_ms", "_bytes")) else text
        return replace(cls.parse(servers), **options) if options else cls.parse(servers)

    @property
    def bootstrap(self) -> list[tuple[str, int]]:
        """The servers as (host, port)."""
        return parse_servers(self.servers)

    @property
    def address(self) -> str:
        """`kafka://host:port,...`, without any secret."""
        return "kafka://" + ",".join(_joined(host, port) for host, port in self.bootstrap)

    def make_ssl_context(self) -> ssl.SSLContext | None:
        """The context for TLS listeners, or None.

        Raises:
            ConfigurationError: A file is missing or is not what it should be, or its password is wrong.
        """
        if self.ssl_context is not None or not self.security_protocol.endswith("SSL"):
            return self.ssl_context
        try:
            context = ssl.create_default_context(cafile=self.ssl_cafile)
            if self.ssl_certfile is not None:
                # Without a password OpenSSL would ask for one on the terminal.
                context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, self.ssl_password or "")
        except (OSError, ValueError) as exc:
            named = ", ".join(filter(None, (self.ssl_cafile, self.ssl_certfile, self.ssl_keyfile)))
            raise ConfigurationError(
                f"kafka: cannot use the TLS files {named}: {exc} (is ssl_password right?)"
            ) from exc
        return context

    def _check_sasl(self) -> None:
        wanted = self.security_protocol.startswith("SASL")
        given = [name for name in ("sasl_mechanism", "sasl_username", "sasl_password", "sasl_token") if self._has(name)]
        if not wanted:
            if given:
                raise ConfigurationError(
                    f"kafka: {given[0]} is set, but security_protocol is {self.security_protocol}: "
                    "write security_protocol='SASL_SSL' (or 'SASL_PLAINTEXT')"
                )
            return
        _one_of("sasl_mechanism", self.sasl_mechanism, MECHANISMS)
        if self.sasl_mechanism == "OAUTHBEARER":
            if self.sasl_token is None:
                raise ConfigurationError("kafka: OAUTHBEARER needs sasl_token=, an async function that returns a token")
        elif not (self._has("sasl_username") and self._has("sasl_password")):
            raise ConfigurationError(f"kafka: {self.sasl_mechanism} needs sasl_username and sasl_password")

    def _check_ssl(self) -> None:
        names = ("ssl_cafile", "ssl_certfile", "ssl_keyfile", "ssl_password")
        given = [name for name in (*names, "ssl_context") if self._has(name)]
        if given and not self.security_protocol.endswith("SSL"):
            raise ConfigurationError(
                f"kafka: {given[0]} is set, but security_protocol is {self.security_protocol}: write "
                f"security_protocol='{'SASL_SSL' if self.security_protocol.startswith('SASL') else 'SSL'}'"
            )
        if self.ssl_context is not None and len(given) > 1:
            raise ConfigurationError(f"kafka: give ssl_context or {given[0]}, not both")
        for name in names[:3]:
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigurationError(f"kafka: {name} names no file: {path}")

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None


def parse_servers(servers: str) -> list[tuple[str, int]]:
    """Split `host:port,[::1]:port,host` into hosts and ports (default 9092).

    Raises:
        ConfigurationError: Something else was written; a part that could hold a password is not repeated.
    """
    found: list[tuple[str, int]] = []
    for server in servers.split(","):
        if "@" in server:
            raise ConfigurationError(
                "kafka: an address holds no user name or password; write sf.Kafka(servers=..., sasl_username=..., "
                "sasl_password=...) or STREAMFLOW_KAFKA_SASL_USERNAME and _PASSWORD"
            )
        host, separator, port = server.strip().rpartition(":")
        if not separator or server.strip().endswith("]"):
            host, port = server.strip(), str(_DEFAULT_PORT)
        if host.startswith("[") != host.endswith("]") or not host.strip("[]") or "/" in server or not port.isdecimal():
            raise ConfigurationError(f"kafka: {server.strip()!r} is no server: write HOST:PORT[,HOST:PORT]")
        if not 0 < int(port) < 65536:
            raise ConfigurationError(f"kafka: {server.strip()!r}: the port must be 1 to 65535")
        found.append((host.strip("[]"), int(port)))
    return found


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _one_of(name: str, value: str | None, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigurationError(f"kafka: {name}={value!r} is unknown; use one of {', '.join(known)}")


def _number(name: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise ConfigurationError(f"{ENVIRONMENT_PREFIX}{name.upper()} must be a whole number, not {text!r}")
    return int(text)
