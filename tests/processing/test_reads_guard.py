"""What is logged of an `@app.authorize_reads` function that raises."""

import asyncio
import logging

import pytest

import streamflow as sf
from streamflow.processing import reads_guard
from streamflow.processing.reads_guard import ReadsGuard

READ = sf.TableRead("stock", "tea", {})


def careless(read: sf.TableRead) -> bool:
    if read.key == "tea":
        return read.headers["x-user"] == "root"
    return read.headers["x-group"] == "staff"


async def test_each_place_that_raises_is_told_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = [1.0]
    monkeypatch.setattr(reads_guard, "monotonic", lambda: now_s[0])
    guard = ReadsGuard(careless)

    async def refused(key: str) -> None:
        with pytest.raises(sf.ReadFailed):
            await guard.check(sf.TableRead("stock", key, {}))

    for _ in range(5):
        await refused("tea")
    await refused("milk")  # another line
    assert len(caplog.records) == 2
    now_s[0] += 59
    await refused("tea")
    assert len(caplog.records) == 2
    now_s[0] += 2
    await refused("tea")
    assert len(caplog.records) == 3
    assert "5 more since it was told last" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 3
    assert "in careless" in caplog.text
    assert "x-user" not in "".join(record.getMessage() for record in caplog.records)


async def test_what_stops_the_reader_is_no_failure_of_the_function(caplog: pytest.LogCaptureFixture) -> None:
    async def waits(read: sf.TableRead) -> bool:
        await asyncio.Event().wait()
        return True

    asked = asyncio.create_task(ReadsGuard(waits).check(READ))
    await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert not caplog.records


async def test_a_refusal_is_as_it_was() -> None:
    def refuses(read: sf.TableRead) -> bool:
        raise PermissionError("not you")

    with pytest.raises(PermissionError, match=r"^not you$"):
        await ReadsGuard(refuses).check(READ)
    with pytest.raises(PermissionError, match="does not allow this"):
        await ReadsGuard(lambda _: 1).check(READ)  # type: ignore[arg-type,return-value]
