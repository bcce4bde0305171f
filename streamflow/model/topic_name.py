"""What may be the name of a topic: Kafka's rule, which every log shares."""

from __future__ import annotations

import re

_NAME = re.compile(r"[A-Za-z0-9._-]{1,249}")
TOPIC_NAME_RULE = "1 to 249 letters, digits, '.', '_' and '-' (ASCII)"
"""The rule in words, for errors."""


def is_topic_name(name: str) -> bool:
    """Whether a topic may be called so."""
    return _NAME.fullmatch(name) is not None and name not in (".", "..")
