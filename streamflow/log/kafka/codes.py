"""What Kafka's error codes and the exceptions below mean for us: the one place that translates them.

Codes that are not listed are treated as retriable: back off, refresh the metadata, count. A broker newer than this list
must not kill a worker.
"""

from __future__ import annotations

import asyncio
import ssl

from streamflow.errors import (
    AuthorizationError,
    ConfigurationError,
    FatalError,
    LogUnavailableError,
    RetriableError,
    StreamFlowError,
    UnknownTopicError,
)
from streamflow.log.kafka.wire import errors

UNKNOWN_SERVER_ERROR = -1
NONE = 0
OFFSET_OUT_OF_RANGE = 1
UNKNOWN_TOPIC_OR_PARTITION = 3
REQUEST_TIMED_OUT = 7
MESSAGE_TOO_LARGE = 10
COORDINATOR_LOADING = 14
COORDINATOR_NOT_AVAILABLE = 15
NOT_COORDINATOR = 16
RECORD_LIST_TOO_LARGE = 18
NOT_ENOUGH_REPLICAS = 19
NOT_ENOUGH_REPLICAS_AFTER_APPEND = 20
ILLEGAL_GENERATION = 22
INCONSISTENT_GROUP_PROTOCOL = 23
UNKNOWN_MEMBER_ID = 25
INVALID_SESSION_TIMEOUT = 26
REBALANCE_IN_PROGRESS = 27
TOPIC_AUTHORIZATION_FAILED = 29
TOPIC_ALREADY_EXISTS = 36
NOT_CONTROLLER = 41
OUT_OF_ORDER_SEQUENCE = 45
DUPLICATE_SEQUENCE = 46
INVALID_PRODUCER_EPOCH = 47
INVALID_TRANSACTION_STATE = 48
INVALID_PRODUCER_ID_MAPPING = 49
INVALID_TRANSACTION_TIMEOUT = 50
CONCURRENT_TRANSACTIONS = 51
OPERATION_NOT_ATTEMPTED = 55
UNKNOWN_PRODUCER_ID = 59
NON_EMPTY_GROUP = 68
GROUP_ID_NOT_FOUND = 69
MEMBER_ID_REQUIRED = 79
FENCED_INSTANCE_ID = 82
UNSTABLE_OFFSET_COMMIT = 88
PRODUCER_FENCED = 90
UNKNOWN_TOPIC_ID = 100
INCONSISTENT_TOPIC_ID = 103
TRANSACTION_ABORTABLE = 120

MEMBERSHIP_REFUSED = frozenset({ILLEGAL_GENERATION, UNKNOWN_MEMBER_ID, REBALANCE_IN_PROGRESS, FENCED_INSTANCE_ID})
COORDINATOR_MOVED = frozenset({COORDINATOR_LOADING, COORDINATOR_NOT_AVAILABLE, NOT_COORDINATOR})
UNACCEPTABLE_RECORDS = frozenset({MESSAGE_TOO_LARGE, RECORD_LIST_TOO_LARGE, 2, 32, 43, 44, 76, 87})
NAMES = {
    -1: "UNKNOWN_SERVER_ERROR",
    1: "OFFSET_OUT_OF_RANGE",
    2: "CORRUPT_MESSAGE",
    3: "UNKNOWN_TOPIC_OR_PARTITION",
    5: "LEADER_NOT_AVAILABLE",
    6: "NOT_LEADER_OR_FOLLOWER",
    7: "REQUEST_TIMED_OUT",
    9: "REPLICA_NOT_AVAILABLE",
    10: "MESSAGE_TOO_LARGE",
    12: "OFFSET_METADATA_TOO_LARGE",
    13: "NETWORK_EXCEPTION",
    14: "COORDINATOR_LOAD_IN_PROGRESS",
    15: "COORDINATOR_NOT_AVAILABLE",
    16: "NOT_COORDINATOR",
    17: "INVALID_TOPIC",
    18: "RECORD_LIST_TOO_LARGE",
    19: "NOT_ENOUGH_REPLICAS",
    20: "NOT_ENOUGH_REPLICAS_AFTER_APPEND",
    22: "ILLEGAL_GENERATION",
    23: "INCONSISTENT_GROUP_PROTOCOL",
    24: "INVALID_GROUP_ID",
    25: "UNKNOWN_MEMBER_ID",
    26: "INVALID_SESSION_TIMEOUT",
    27: "REBALANCE_IN_PROGRESS",
    28: "INVALID_COMMIT_OFFSET_SIZE",
    29: "TOPIC_AUTHORIZATION_FAILED",
    30: "GROUP_AUTHORIZATION_FAILED",
    31: "CLUSTER_AUTHORIZATION_FAILED",
    32: "INVALID_TIMESTAMP",
    35: "UNSUPPORTED_VERSION",
    36: "TOPIC_ALREADY_EXISTS",
    37: "INVALID_PARTITIONS",
    38: "INVALID_REPLICATION_FACTOR",
    40: "INVALID_CONFIG",
    41: "NOT_CONTROLLER",
    42: "INVALID_REQUEST",
    43: "UNSUPPORTED_FOR_MESSAGE_FORMAT",
    44: "POLICY_VIOLATION",
    45: "OUT_OF_ORDER_SEQUENCE_NUMBER",
    46: "DUPLICATE_SEQUENCE_NUMBER",
    47: "INVALID_PRODUCER_EPOCH",
    48: "INVALID_TXN_STATE",
    49: "INVALID_PRODUCER_ID_MAPPING",
    50: "INVALID_TRANSACTION_TIMEOUT",
    51: "CONCURRENT_TRANSACTIONS",
    53: "TRANSACTIONAL_ID_AUTHORIZATION_FAILED",
    55: "OPERATION_NOT_ATTEMPTED",
    56: "KAFKA_STORAGE_ERROR",
    59: "UNKNOWN_PRODUCER_ID",
    68: "NON_EMPTY_GROUP",
    69: "GROUP_ID_NOT_FOUND",
    74: "FENCED_LEADER_EPOCH",
    75: "UNKNOWN_LEADER_EPOCH",
    76: "UNSUPPORTED_COMPRESSION_TYPE",
    78: "OFFSET_NOT_AVAILABLE",
    79: "MEMBER_ID_REQUIRED",
    81: "GROUP_MAX_SIZE_REACHED",
    82: "FENCED_INSTANCE_ID",
    87: "INVALID_RECORD",
    88: "UNSTABLE_OFFSET_COMMIT",
    89: "THROTTLING_QUOTA_EXCEEDED",
    90: "PRODUCER_FENCED",
    100: "UNKNOWN_TOPIC_ID",
    103: "INCONSISTENT_TOPIC_ID",
    113: "INVALID_REGISTRATION",
    120: "TRANSACTION_ABORTABLE",
}
_AUTHORIZATION = {
    29: "the ACL on the topic (Read to read it, Write to write to it, Describe in any case)",
    30: "the ACL Read on the group",
    31: "the cluster ACL that it needs (IdempotentWrite, Create, Describe)",
    53: "the ACLs Write and Describe on the transactional id",
    65: "the ACL on the delegation token",
}
_FATAL = frozenset({12, 17, 23, 24, 26, 28, 35, 42, 81})


def name(code: int) -> str:
    """A code's name, and its number for those that are newer than the list."""
    return f"{NAMES[code]} ({code})" if code in NAMES else f"error code {code}"


def error(code: int, what: str) -> StreamFlowError:
    """The error that a code means.

    Args:
        code: Not 0.
        what: What was attempted and on what, as in `read topic orders`.
    """
    if code in _AUTHORIZATION:
        return AuthorizationError(f"{what}: this user is not authorized, {name(code)}; grant it {_AUTHORIZATION[code]}")
    if code == UNKNOWN_TOPIC_OR_PARTITION:
        return UnknownTopicError(f"{what}: the topic or partition does not exist")
    if code in _FATAL:
        return FatalError(f"{what}: refused with {name(code)}")
    return RetriableError(f"{what}: {name(code)}")


def translated(exc: BaseException, what: str) -> StreamFlowError:
    """The error that an exception of aiokafka, asyncio or ssl means; raise it `from exc`."""
    if isinstance(exc, errors.KafkaConnectionError) and isinstance(exc.__cause__, ssl.SSLError):
        exc = exc.__cause__  # the broker refused our certificate after its own was accepted
    if isinstance(exc, errors.SaslAuthenticationFailed | errors.AuthenticationFailedError):
        return AuthorizationError(f"{what}: the broker refused the credentials (user name, password or token)")
    if isinstance(exc, errors.UnsupportedSaslMechanismError | errors.IllegalSaslStateError):
        return ConfigurationError(f"{what}: the listener does not offer this sasl_mechanism")
    if isinstance(exc, errors.IncompatibleBrokerVersion | NotImplementedError):
        return ConfigurationError(f"{what}: the broker is too old or too new: {exc}; StreamFlow needs Kafka 2.5 to 4.x")
    if isinstance(exc, ssl.SSLCertVerificationError):
        return ConfigurationError(f"{what}: the broker's certificate is not trusted: {exc.verify_message}")
    if isinstance(exc, ssl.SSLError):
        return ConfigurationError(f"{what}: TLS failed ({exc.reason}); is this a TLS listener, is a client key needed?")
    if isinstance(exc, asyncio.TimeoutError | TimeoutError):
        return LogUnavailableError(f"{what}: no answer in time")
    if isinstance(exc, errors.BrokerResponseError):
        return error(exc.errno, what)
    return LogUnavailableError(f"{what}: {exc}")
