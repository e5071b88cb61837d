"""A policy skips exactly where its paper's rule says so, never on a signal it cannot trust, never beyond its cap."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel import call, policy
from accel.policy import (
    Decision,
    FixedPolicy,
    IntervalPolicy,
    Policy,
    ThresholdPolicy,
    TriModalConfig,
    TriModalPolicy,
)

CACHE, PREDICT, RECOMPUTE = Decision.CACHE, Decision.PREDICT, Decision.RECOMPUTE
increments = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=60)
anything = st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=60)


def scope(tau_cache: float = 0.18, tau_predict: float = 0.42, **options: object) -> TriModalPolicy:
    return TriModalPolicy(TriModalConfig(tau_cache, tau_predict, **options))


def every_policy() -> list[Policy]:
    return [
        ThresholdPolicy(0.3, max_skip=3),
        scope(max_skip=3),
        FixedPolicy([CACHE, PREDICT] * 2),
        IntervalPolicy(3),
    ]


def test_the_decision_is_the_one_a_call_carries() -> None:
    assert policy.Decision is call.Decision


def test_every_policy_answers_the_engines_questions() -> None:
    assert all(isinstance(entry, Policy) for entry in every_policy())


def test_the_increments_are_summed_until_they_pass_delta() -> None:
    rule = ThresholdPolicy(0.25)
    answers, sums = [], []
    for increment in (0.125, 0.125, 0.125, 0.25, 0.03125):
        answers.append(rule.decide(increment))
        sums.append(rule.accumulated)
    assert answers == [CACHE, CACHE, RECOMPUTE, CACHE, RECOMPUTE]
    assert sums == [0.125, 0.25, 0.375, 0.25, 0.28125]
    assert rule.threshold == 0.25 and rule.reason == "threshold"


def test_a_sum_equal_to_delta_reuses_only_inclusively() -> None:
    assert ThresholdPolicy(0.25).decide(0.25) is CACHE
    assert ThresholdPolicy(0.25, max_skip=None, inclusive=False).decide(0.25) is RECOMPUTE


def test_without_a_cap_a_still_signal_reuses_for_ever_and_with_one_it_does_not() -> None:
    free, capped = ThresholdPolicy(0.1, max_skip=None), ThresholdPolicy(0.1, max_skip=5)
    assert [free.decide(0.0) for _ in range(40)] == [CACHE] * 40
    assert [capped.decide(0.0) for _ in range(12)] == ([CACHE] * 5 + [RECOMPUTE]) * 2
    assert capped.reason == "cap"


def test_flowcache_on_magi_decides_as_the_reference() -> None:
    """First chunk of 16 steps, threshold 0.6, warm-up 2; features 1 + sin(j + 0.35 n^1.2) / 2 for j in 0..11."""
    reused = {2: 0.13607269, 3: 0.2912674, 4: 0.45958451, 6: 0.19144563, 7: 0.38834973, 8: 0.57542954, 10: 0.20888143}
    reused |= {11: 0.41459972, 13: 0.20709203, 14: 0.42494212}
    features = [[1 + 0.5 * math.sin(j + 0.35 * n**1.2) for j in range(12)] for n in range(16)]
    rule = ThresholdPolicy(0.6, max_skip=None, inclusive=False)
    for n in range(16):
        if n < 2:
            rule.force()
            continue
        change = sum(abs(a - b) for a, b in zip(features[n], features[n - 1], strict=True))
        answer = rule.decide(change / sum(map(abs, features[n - 1])))
        assert answer is (CACHE if n in reused else RECOMPUTE), n
        if n in reused:
            assert rule.accumulated == pytest.approx(reused[n], abs=1e-6)


def test_scope_walks_through_its_three_modes_with_its_printed_decay() -> None:
    rule = scope(0.25, 0.5, decay=0.75)
    assert (rule.decide(0.125), rule.accumulated, rule.threshold) == (CACHE, 0.125, 0.25)
    assert (rule.decide(0.25), rule.accumulated, rule.threshold) == (PREDICT, 0.375, 0.5)
    assert (rule.decide(0.125), rule.accumulated) == (PREDICT, 0.75 * 0.375 + 0.125)
    assert (rule.decide(0.5), rule.reason) == (RECOMPUTE, "threshold")
    assert (rule.decide(0.0), rule.accumulated) == (CACHE, 0.0)


def test_the_thresholds_themselves_belong_to_the_next_mode() -> None:
    assert scope(0.25, 0.5).decide(0.25) is PREDICT
    assert scope(0.25, 0.5).decide(0.5) is RECOMPUTE


def test_equal_thresholds_never_predict() -> None:
    rule = scope(0.25, 0.25)
    assert [rule.decide(0.125) for _ in range(4)] == [CACHE, RECOMPUTE, CACHE, RECOMPUTE]


def test_without_a_cache_threshold_nothing_is_held() -> None:
    rule = scope(0.0, 0.5)
    assert rule.decide(0.0) is PREDICT
    assert rule.decide(0.125, can_predict=False) is RECOMPUTE


def test_a_short_history_holds_below_the_middle_and_recomputes_above_it() -> None:
    below, above = scope(0.25, 0.5), scope(0.25, 0.5)
    assert (below.decide(0.3125, can_predict=False), below.threshold) == (CACHE, 0.375)
    assert (above.decide(0.375, can_predict=False), above.reason) == (RECOMPUTE, "no history")
    assert below.decide(0.0, can_predict=False) is CACHE
    assert below.accumulated == 0.3125


def test_with_nothing_stored_every_mode_recomputes() -> None:
    rule = scope(0.25, 0.5)
    for increment in (0.125, 0.375):
        assert rule.decide(increment, can_cache=False, can_predict=False) is RECOMPUTE
        assert rule.reason == "no history"
    held = ThresholdPolicy(0.5)
    assert (held.decide(0.125, can_cache=False), held.reason) == (RECOMPUTE, "no history")


@given(increments, st.floats(0.0, 0.5), st.floats(0.0, 0.5), st.floats(0.01, 1.0), st.integers(1, 6))
def test_the_running_sum_follows_equation_five(
    values: list[float], low: float, gap: float, decay: float, max_skip: int
) -> None:
    rule = scope(low, low + gap, decay=decay, max_skip=max_skip)
    remainder = 0.0
    for value in values:
        answer = rule.decide(value)
        summed = remainder + value
        assert rule.accumulated == summed
        assert answer is not CACHE or summed < low
        assert answer is not PREDICT or low <= summed < low + gap
        remainder = {CACHE: summed, PREDICT: decay * summed, RECOMPUTE: 0.0}[answer]


def test_a_config_refuses_what_has_no_meaning_and_names_value_and_remedy() -> None:
    cases = [
        ((0.5, 0.25), {}, "tau_cache 0.5 is above tau_predict 0.25.*lower tau_cache"),
        ((-0.5, 0.25), {}, "tau_cache -0.5.*use 0"),
        ((0.1, math.inf), {}, "tau_predict inf.*use 0"),
        ((math.nan, 0.25), {}, "tau_cache nan"),
        ((0.1, 0.2), {"decay": 0.0}, "decay 0.0.*use 0.75"),
        ((0.1, 0.2), {"decay": math.nan}, "decay nan"),
        ((0.1, 0.2), {"max_skip": 0}, "max_skip 0.*None for no cap"),
        ((0.1, 0.2), {"max_skip": 2.5}, "max_skip 2.5"),
    ]
    for levels, options, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            TriModalConfig(*levels, **options)
    for delta in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"delta {delta}"):
            ThresholdPolicy(delta)
    with pytest.raises(ValueError, match="max_skip 0"):
        ThresholdPolicy(0.1, max_skip=0)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TriModalConfig(0.1, 0.2).decay = 0.5  # type: ignore[misc]


@given(increments)
def test_thresholds_at_zero_always_recompute(values: list[float]) -> None:
    for rule in (ThresholdPolicy(0.0), ThresholdPolicy(0.0, inclusive=False, max_skip=None), scope(0.0, 0.0)):
        assert all(rule.decide(value) is RECOMPUTE for value in [0.0, *values])
        assert rule.reason == "off"


@given(anything)
def test_a_signal_that_is_no_number_never_skips(values: list[float]) -> None:
    for rule in every_policy():
        for value in values:
            answer = rule.decide(value)
            if not math.isfinite(value) or value < 0.0:
                assert answer is RECOMPUTE
                assert rule.accumulated is None
    for rule in (ThresholdPolicy(0.3), scope()):
        assert (rule.decide(math.nan), rule.reason) == (RECOMPUTE, "non-finite")
        assert (rule.decide(-0.1), rule.reason) == (RECOMPUTE, "non-finite")
        assert rule.decide(0.1) is CACHE


@given(increments, st.integers(1, 6), st.lists(st.booleans(), min_size=60, max_size=60))
def test_no_more_than_max_skip_calls_in_a_row_are_skipped(
    values: list[float], cap: int, can_predict: list[bool]
) -> None:
    for rule in (ThresholdPolicy(5.0, max_skip=cap), scope(0.3, 5.0, max_skip=cap), IntervalPolicy(cap + 1)):
        run = 0
        for value, able in zip(values, can_predict, strict=False):
            run = run + 1 if rule.decide(value, can_predict=able) is not RECOMPUTE else 0
            assert run <= cap


@given(increments, increments)
def test_a_reset_policy_answers_as_a_new_one(before: list[float], after: list[float]) -> None:
    for used, new in zip(every_policy(), every_policy(), strict=True):
        for value in before:
            used.decide(value)
        used.reset()
        assert (used.accumulated, used.threshold, used.reason) == (new.accumulated, new.threshold, new.reason)
        assert [used.decide(value) for value in after] == [new.decide(value) for value in after]


def test_a_forced_call_starts_sum_and_skips_again() -> None:
    rule = ThresholdPolicy(0.25, max_skip=2)
    rule.decide(0.125)
    rule.decide(0.125)
    rule.force()
    assert (rule.accumulated, rule.reason) == (None, None)
    assert [rule.decide(0.125), rule.decide(0.125), rule.decide(0.0)] == [CACHE, CACHE, RECOMPUTE]
    assert rule.reason == "cap"


def test_a_fixed_list_is_replayed_and_then_recomputes() -> None:
    rule = FixedPolicy(["recompute", "cache", "predict"])
    assert [rule.decide(0.9) for _ in range(5)] == [RECOMPUTE, CACHE, PREDICT, RECOMPUTE, RECOMPUTE]


def test_a_forced_call_takes_its_place_in_the_list() -> None:
    rule = FixedPolicy([RECOMPUTE, CACHE, PREDICT])
    rule.force()
    assert [rule.decide(), rule.decide()] == [CACHE, PREDICT]


def test_a_list_for_the_whole_run_keeps_its_place_over_segments() -> None:
    again, onward = FixedPolicy([RECOMPUTE, CACHE, PREDICT]), FixedPolicy([RECOMPUTE, CACHE, PREDICT], rewind=False)
    for rule in (again, onward):
        rule.decide()
        rule.decide()
        rule.reset()
    assert (again.decide(), onward.decide()) == (RECOMPUTE, PREDICT)


def test_a_planned_skip_that_cannot_be_served_recomputes() -> None:
    rule = FixedPolicy([CACHE, PREDICT, CACHE])
    assert (rule.decide(can_cache=False), rule.reason) == (RECOMPUTE, "no history")
    assert (rule.decide(can_predict=False), rule.reason) == (RECOMPUTE, "no history")
    assert rule.decide(can_predict=False) is CACHE


def test_an_interval_recomputes_every_nth_call() -> None:
    rule = IntervalPolicy(3)
    assert [rule.decide() for _ in range(7)] == [RECOMPUTE, PREDICT, PREDICT, RECOMPUTE, PREDICT, PREDICT, RECOMPUTE]
    assert rule.reason == "cap"
    held = IntervalPolicy(2, skip="cache")
    held.force()
    assert [held.decide() for _ in range(4)] == [CACHE, RECOMPUTE, CACHE, RECOMPUTE]


def test_an_interval_of_one_skips_nothing() -> None:
    rule = IntervalPolicy(1)
    assert {rule.decide() for _ in range(5)} == {RECOMPUTE}


def test_an_interval_refuses_what_skips_nothing() -> None:
    with pytest.raises(ValueError, match="interval 0"):
        IntervalPolicy(0)
    with pytest.raises(ValueError, match="skip 'recompute'"):
        IntervalPolicy(2, skip=RECOMPUTE)
