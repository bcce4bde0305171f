"""Changes in memory over a range of the store, in key order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def merged(
    base: Iterator[tuple[bytes, bytes]],
    changes: Mapping[bytes, bytes | None],
    start: bytes | None,
    stop: bytes | None,
    *,
    reverse: bool,
) -> Iterator[tuple[bytes, bytes]]:
    """Iterate over a range as it would be with the changes applied.

    Args:
        base: What the store has of the range, in key order (or reverse).
        changes: New values by key, None where it was deleted; keys outside the range are passed over.
        start: First key, inclusive; None for the beginning.
        stop: End, exclusive; None for the end.
        reverse: Whether the order is from the end to the start.
    """
    changed = sorted(
        (key for key in changes if (start is None or key >= start) and (stop is None or key < stop)), reverse=reverse
    )
    newer = iter([(key, changes[key]) for key in changed])
    return _merge(base, newer, reverse=reverse)


def _merge(
    base: Iterator[tuple[bytes, bytes]], newer: Iterator[tuple[bytes, bytes | None]], *, reverse: bool
) -> Iterator[tuple[bytes, bytes]]:
    below, above = next(base, None), next(newer, None)
    while below is not None and above is not None:
        if below[0] == above[0]:
            below = next(base, None)
        elif (below[0] < above[0]) is not reverse:
            yield below
            below = next(base, None)
            continue
        key, value = above
        if value is not None:
            yield key, value
        above = next(newer, None)
    while below is not None:
        yield below
        below = next(base, None)
    while above is not None:
        key, value = above
        if value is not None:
            yield key, value
        above = next(newer, None)
