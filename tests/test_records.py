"""Records of a run, packed."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel.records import DECISIONS, Columns, Records, StepRecord

number = st.none() | st.floats(allow_nan=False)
frame = st.integers(0, 2**31 - 1)
interval = st.tuples(frame, frame).map(lambda pair: (min(pair), max(pair)))
record = st.builds(
    StepRecord,
    segment=st.integers(0, 2**31 - 1),
    iteration=st.integers(0, 2**31 - 1),
    frames=interval,
    decision=st.sampled_from(DECISIONS),
    sigma=number,
    window=st.none() | interval,
    forced=st.none() | st.text(max_size=8),
    sigmas=st.none() | st.lists(st.floats(0, 1), max_size=4).map(tuple),
    discrepancy=number,
    increment=number,
    threshold=number,
    order=st.none() | st.integers(0, 2) | st.just("newton2"),
    corrected=number,
    queries=st.none() | st.lists(interval, max_size=3).map(tuple),
    error=number,
    flops=st.integers(0, 2**62),
    seconds=st.floats(0, 1e9),
)


@given(st.lists(record, max_size=8), st.data())
def test_records_come_out_as_they_went_in_and_behave_like_a_list(records, data):
    packed, plain = Records(records), list(records)
    assert packed == plain and len(packed) == len(plain) and list(packed) == plain
    index = data.draw(st.integers(0, len(plain)))
    one = data.draw(record)
    packed.insert(index, one)
    plain.insert(index, one)
    packed[index - len(plain)] = plain[-1]
    plain[index - len(plain)] = plain[-1]
    assert packed == plain and packed[index] == plain[index]
    cut = data.draw(st.slices(len(plain)))
    assert packed[cut] == plain[cut]
    del packed[cut]
    del plain[cut]
    assert packed == plain
    packed[:] = [one]
    assert packed == [one]
    with pytest.raises(IndexError):
        packed[1]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=20))
def test_columns_count_iterations_in_order_of_first_appearance(keys):
    columns, seen = Columns(), []
    for segment, iteration in keys:
        one = StepRecord(segment, iteration, (0, 1), "cache", 0.5)
        columns.add(one)
        if (segment, iteration) not in seen:
            seen.append((segment, iteration))
        assert len(columns) == len(seen)
        assert [columns[StepRecord(*key, (0, 1), "cache", 0.5)] for key in seen] == list(range(len(seen)))
    with pytest.raises(KeyError):
        columns[StepRecord(9, 9, (0, 1), "cache", 0.5)]


@pytest.mark.parametrize("field", [{"segment": -(2**40)}, {"flops": 2**70}, {"flops": "many"}, {"sigma": "high"}])
def test_a_record_that_cannot_be_kept_is_refused(field):
    told = {"segment": 0, "iteration": 0, "frames": (0, 1), "decision": "cache", "sigma": 0.5} | field
    with pytest.raises(ValueError, match="cannot be kept"):
        Records([StepRecord(**told)])


def test_a_call_of_an_endless_rollout_takes_little():
    def one(call):
        return StepRecord(
            call // 5, call % 5, (call, call + 4), "recompute", 0.9, sigmas=(0.9,), flops=call, seconds=call
        )

    records, columns = Records(), Columns()
    tracemalloc.start()
    for call in range(10_000):
        if call == 5000:
            before = tracemalloc.get_traced_memory()[0]
        records.append(one(call))
        columns.add(records[-1])
    size = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert size < 150 * 5000
