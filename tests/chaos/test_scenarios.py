"""A seed says what goes wrong: the same each time."""

from __future__ import annotations

import pytest

from tests.chaos.faults import ON_KAFKA
from tests.chaos.scenarios import SCENARIOS, Variant


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_plan_is_its_seeds(scenario: str) -> None:
    variant = Variant(scenario, "kafka")
    assert variant.plan(7) == variant.plan(7)
    if len(set(SCENARIOS[scenario])) > 2:
        assert len({tuple(variant.plan(seed)) for seed in range(20)}) > 1
    assert variant.plan(7)[0] == "grow"
    assert variant.plan(7)[-1] == "shrink"


def test_what_needs_brokers_is_left_out_without_them() -> None:
    assert not set(Variant("mixed", "sqlite").plan(7)) & set(ON_KAFKA)
    assert Variant("cut", "sqlite").plan(7) == []
    assert set(ON_KAFKA) <= set(Variant("mixed", "kafka").plan(7))
