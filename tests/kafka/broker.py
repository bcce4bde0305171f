"""A real Kafka broker (KRaft, one process) for tests and development.

`python -m tests.kafka.broker --port 9092` runs one in the foreground until Ctrl-C.
"""

import argparse
import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.kafka import jars
from tests.kafka.certificates import Certificates
from tests.ports import HOST, free_port

START_TIMEOUT_S = 40
START_ATTEMPTS = 3
STARTED = b"Kafka Server started"
STOP_TIMEOUT_S = 15
LOG_TAIL_LINES = 40

SCRAM_USER, SCRAM_PASSWORD = "ann", "ann-very-secret"
PLAIN_USER, PLAIN_PASSWORD = "bob", "bob-very-secret"
POWERLESS_USER, POWERLESS_PASSWORD = "eve", "eve-very-secret"
"""A PLAIN user that may connect and nothing else; the others may do everything."""

LOG4J = """\
<Configuration status="WARN">
  <Appenders><Console name="out"><PatternLayout pattern="%d{HH:mm:ss.SSS} %p %c{1}: %m%n"/></Console></Appenders>
  <Loggers>
    <Root level="${sys:streamflow.level:-WARN}"><AppenderRef ref="out"/></Root>
    <Logger name="kafka.server.KafkaRaftServer" level="INFO"/>
  </Loggers>
</Configuration>
"""

LOG4J_1 = """\
log4j.rootLogger=${streamflow.level}, out
log4j.appender.out=org.apache.log4j.ConsoleAppender
log4j.appender.out.layout=org.apache.log4j.PatternLayout
log4j.appender.out.layout.ConversionPattern=%d{HH:mm:ss,SSS} %p %c{1}: %m%n
log4j.logger.kafka.server.KafkaRaftServer=INFO
"""

# Small and fast: what a laptop test wants, never what production wants.
DEFAULTS = {
    "num.partitions": "4",
    "offsets.topic.num.partitions": "4",
    # Tests write records of any time; a broker that lives for minutes would delete the old ones.
    "log.retention.ms": "-1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.segment.bytes": "1048576",
    "transaction.state.log.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.segment.bytes": "1048576",
    "share.coordinator.state.topic.num.partitions": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "500",
    "num.network.threads": "2",
    "num.io.threads": "4",
    "background.threads": "2",
    "log.cleaner.threads": "1",
    "log.cleaner.backoff.ms": "200",
    "log.cleaner.dedupe.buffer.size": "2097152",
    "log.index.size.max.bytes": "1048576",
    "controlled.shutdown.enable": "true",
    "auto.create.topics.enable": "true",
    "initial.broker.registration.timeout.ms": "30000",
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
    "controller.quorum.election.backoff.max.ms": "200",
    "controller.quorum.election.timeout.ms": "500",
    "controller.quorum.fetch.timeout.ms": "1000",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
}
JAVA_OPTIONS = (
    "-Xms96m",
    "-Xmx384m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",
    "-Xshare:auto",
    "-Djava.awt.headless=true",
)


_bootstraps: dict[Path, bytes] = {}
"""What the format tool writes beside a broker's ids, by version: the same every time, for a second of a JVM."""


def random_id() -> str:
    made = urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    return random_id() if made.startswith("-") else made  # the format tool would take it for an option


class BrokerError(RuntimeError):
    """The broker did not start or ended by itself; the text holds the tail of its log."""


class Broker:
    """One broker process and its data directory.

    `certificates` opens three more listeners: SSL, SASL_SSL and SASL_PLAINTEXT, with users for SCRAM-SHA-256/512 and
    PLAIN, OAUTHBEARER with unsecured tokens, and an authorizer. `controllers` ({node id: port}) makes it one node of a
    `Cluster`. `pom` names the version. Each of `proxied_ports` opens one more listener (`proxied`), whose clients are
    sent to that port of this machine for everything: a test puts a `Proxy` there.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int = 0,
        config: Mapping[str, str] | None = None,
        certificates: Certificates | None = None,
        node_id: int = 1,
        controllers: Mapping[int, int] | None = None,
        cluster_id: str | None = None,
        pom: Path = jars.POM,
        proxied_ports: Sequence[int] = (),
    ) -> None:
        self._proxied_ports = {f"PROXIED_{number}": port for number, port in enumerate(proxied_ports)}
        self.directory = directory
        self.node_id = node_id
        self._given = (port, dict(controllers or {}))
        self._cluster_id = cluster_id or random_id()
        self._certificates = certificates
        self._choose_ports()
        self._config = dict(config or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._jars = jars.resolve(pom)

    @property
    def bootstrap(self) -> str:
        return self.listener("PLAINTEXT")

    def listener(self, protocol: str) -> str:
        """host:port of one listener; TLS ones answer to the name in their certificate."""
        return f"{'localhost' if protocol.endswith('SSL') else HOST}:{self._ports[protocol]}"

    def proxied(self, number: int = 0) -> int:
        """The port behind one of `proxied_ports`: what a `Proxy` there forwards to."""
        return self._ports[f"PROXIED_{number}"]

    @property
    def runs(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise BrokerError("the broker is not running")
        return self._process.pid

    def _choose_ports(self) -> None:
        port, controllers = self._given
        self._controllers = controllers or {self.node_id: free_port()}
        protocols = ["PLAINTEXT"]
        if self._certificates is not None:
            protocols += ["SSL", "SASL_SSL", "SASL_PLAINTEXT"]
        protocols += self._proxied_ports
        self._ports = {protocol: free_port() for protocol in protocols}
        if port:
            self._ports["PLAINTEXT"] = port

    def start(self, *, wait: bool = True) -> None:
        """Format the directory if it is new, start, and wait until the broker answers."""
        is_new = not (self.directory / "server.properties").exists()
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                self._start(wait=wait)
                return
            except BrokerError:
                self.kill()
                if not is_new or any(self._given) or attempt == START_ATTEMPTS:
                    raise
                shutil.rmtree(self.directory)  # somebody took a port meanwhile: once more with others
                self._choose_ports()

    def _start(self, *, wait: bool) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        properties = self.directory / "server.properties"
        if not properties.exists():
            (self.directory / "log4j2.xml").write_text(LOG4J)
            (self.directory / "log4j.properties").write_text(LOG4J_1)
            properties.write_text("".join(f"{name}={value}\n" for name, value in self._properties().items()))
            self._format(properties)
        with self._log_path.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self._java("kafka.Kafka", str(properties)),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.directory,
                start_new_session=True,  # Ctrl-C is for us; we stop the broker in order
            )
        atexit.register(self.kill)
        if wait:
            self.wait_until_up()

    def wait_until_up(self) -> None:
        """Until it says so itself: what answers on the port may be somebody else."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while STARTED not in self._log_path.read_bytes()[self._log_start :]:
            if self._process is None or self._process.poll() is not None:
                raise BrokerError(f"the broker ended while starting:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                self.kill()
                raise BrokerError(f"the broker was not up after {START_TIMEOUT_S} s:\n{self.log_tail()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Shut down in order; what does not end in time is killed."""
        if self._process is None:
            return
        self.resume()
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def kill(self) -> None:
        """`kill -9`: what a crash looks like. The data stay for `start`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        atexit.unregister(self.kill)

    def pause(self) -> None:
        """SIGSTOP: the sockets stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.kill(self.pid, signal.SIGCONT)

    def configure_topic(self, topic: str, config: Mapping[str, str]) -> None:
        """Change a topic's configuration while the broker runs."""
        change = ",".join(f"{name}={value}" for name, value in config.items())
        options = ("--alter", "--entity-type", "topics", "--entity-name", topic, "--add-config", change)
        command = self._java("kafka.admin.ConfigCommand", "--bootstrap-server", self.bootstrap, *options)
        subprocess.run(command, check=True, capture_output=True, timeout=60, cwd=self.directory)

    def restart(self) -> None:
        self.stop()
        self.start()

    def log_tail(self) -> str:
        lines = self._log_path.read_text(errors="replace").splitlines() if self._log_path.exists() else []
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def wait(self) -> None:
        """Until the process ends by itself."""
        if self._process is not None:
            self._process.wait()

    def __enter__(self) -> "Broker":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def _log_path(self) -> Path:
        return self.directory / "broker.log"

    def _java(self, main: str, *arguments: str) -> list[str]:
        level = os.environ.get("STREAMFLOW_KAFKA_LOG", "WARN")
        return [
            shutil.which("java") or "java",
            *JAVA_OPTIONS,
            f"-Dlog4j2.configurationFile={self.directory / 'log4j2.xml'}",
            f"-Dlog4j.configuration=file:{self.directory / 'log4j.properties'}",
            f"-Dstreamflow.level={level}",
            "-cp",
            f"{self._jars}/*",
            main,
            *arguments,
        ]

    def _format(self, properties: Path) -> None:
        bootstrap = _bootstraps.get(self._jars)
        if bootstrap is None or self._certificates is not None:
            self._run_format_tool(properties)
            if self._certificates is None:
                _bootstraps[self._jars] = (self._data / "bootstrap.checkpoint").read_bytes()
            return
        self._data.mkdir()
        (self._data / "bootstrap.checkpoint").write_bytes(bootstrap)
        ids = {"cluster.id": self._cluster_id, "node.id": self.node_id, "directory.id": random_id(), "version": 1}
        (self._data / "meta.properties").write_text("".join(f"{name}={value}\n" for name, value in ids.items()))

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _run_format_tool(self, properties: Path) -> None:
        command = self._java("kafka.tools.StorageTool", "format", "-t", self._cluster_id, "-c", str(properties))
        if self._certificates is not None:
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"):
                command += ["-S", f"{mechanism}=[name={SCRAM_USER},password={SCRAM_PASSWORD}]"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=self.directory)
        if told.returncode:
            raise BrokerError(f"formatting {self.directory} failed:\n{told.stdout}{told.stderr}")

    def _properties(self) -> dict[str, str]:
        listeners = {name: f"{HOST}:{port}" for name, port in self._ports.items()}
        protocols = {name: name for name in listeners} | {"CONTROLLER": "PLAINTEXT"}
        advertised = {name: self.listener(name) for name in listeners}
        for name, port in self._proxied_ports.items():
            protocols[name] = "PLAINTEXT"
            advertised[name] = f"{HOST}:{port}"
        return {
            "process.roles": "broker,controller",
            "node.id": str(self.node_id),
            "controller.quorum.voters": ",".join(f"{node}@{HOST}:{port}" for node, port in self._controllers.items()),
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAINTEXT",
            "listeners": ",".join(
                [f"{name}://{at}" for name, at in listeners.items()]
                + [f"CONTROLLER://{HOST}:{self._controllers[self.node_id]}"]
            ),
            "advertised.listeners": ",".join(f"{name}://{at}" for name, at in advertised.items()),
            "listener.security.protocol.map": ",".join(f"{name}:{protocol}" for name, protocol in protocols.items()),
            "log.dirs": str(self._data),
            **DEFAULTS,
            **self._security(),
            **self._config,
        }

    def _security(self) -> dict[str, str]:
        if self._certificates is None:
            return {}
        modules = "org.apache.kafka.common.security"
        users = {PLAIN_USER: PLAIN_PASSWORD, POWERLESS_USER: POWERLESS_PASSWORD}
        plain = f"{modules}.plain.PlainLoginModule required"
        plain += "".join(f' user_{user}="{password}"' for user, password in users.items()) + ";"
        oauth = f'{modules}.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="broker";'
        settings = {
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self._certificates.broker),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self._certificates.authority),
            "ssl.client.auth": "none",
            "listener.name.ssl.ssl.client.auth": "required",
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": f"User:ANONYMOUS;User:{SCRAM_USER};User:{PLAIN_USER};User:CN=client",
            "sasl.enabled.mechanisms": "SCRAM-SHA-256,SCRAM-SHA-512,PLAIN,OAUTHBEARER",
        }
        for listener in ("sasl_ssl", "sasl_plaintext"):
            prefix = f"listener.name.{listener}"
            scram = f"{modules}.scram.ScramLoginModule required;"
            settings[f"{prefix}.plain.sasl.jaas.config"] = plain
            settings[f"{prefix}.scram-sha-256.sasl.jaas.config"] = scram
            settings[f"{prefix}.scram-sha-512.sasl.jaas.config"] = scram
            settings[f"{prefix}.oauthbearer.sasl.jaas.config"] = oauth
        return settings


class Cluster:
    """Several brokers that are one cluster: for changes of leader. `proxied_ports` are those of each node."""

    def __init__(
        self,
        directory: Path,
        *,
        nodes: int = 3,
        config: Mapping[str, str] | None = None,
        proxied_ports: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        controllers = {node: free_port() for node in range(1, nodes + 1)}
        cluster_id = random_id()
        replicated = {
            "offsets.topic.replication.factor": str(nodes),
            "transaction.state.log.replication.factor": str(nodes),
            "default.replication.factor": str(nodes),
            **(config or {}),
        }
        self.brokers = {
            node: Broker(
                directory / f"node-{node}",
                node_id=node,
                controllers=controllers,
                cluster_id=cluster_id,
                config=replicated,
                proxied_ports=(proxied_ports or {}).get(node, ()),
            )
            for node in controllers
        }

    @property
    def bootstrap(self) -> str:
        return ",".join(broker.bootstrap for broker in self.brokers.values())

    def __enter__(self) -> "Cluster":
        for broker in self.brokers.values():
            broker.start(wait=False)
        for broker in self.brokers.values():
            broker.wait_until_up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for broker in self.brokers.values():
            broker.kill()


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a real Kafka broker in the foreground, for development.")
    parser.add_argument("--port", type=int, default=9092)
    parser.add_argument("--data", type=Path, help="keep the data here (default: thrown away)")
    arguments = parser.parse_args()
    # Both: a shell that is not interactive starts background jobs with SIGINT ignored.
    signal.signal(signal.SIGTERM, _interrupted)
    signal.signal(signal.SIGINT, _interrupted)
    with contextlib.ExitStack() as stack:
        scratch = arguments.data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="streamflow-kafka-")))
        try:
            broker = Broker(scratch.absolute(), port=arguments.port)
            broker.start()
        except (BrokerError, jars.JarsMissingError) as error:
            raise SystemExit(str(error)) from error
        print(f"Kafka {jars.kafka_version()} listens on {broker.bootstrap}; Ctrl-C stops it", flush=True)
        try:
            broker.wait()
            raise SystemExit(f"the broker ended by itself:\n{broker.log_tail()}")
        except KeyboardInterrupt:
            print("Stopping ...", flush=True)
        finally:
            broker.stop()


if __name__ == "__main__":
    main()
