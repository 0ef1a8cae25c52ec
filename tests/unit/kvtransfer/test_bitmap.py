"""Sets as integers against sets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.kvtransfer import bitmap

INDICES = st.lists(st.integers(0, 1500), max_size=40)
RUNS = st.builds(lambda start, count: list(range(start, start + count)), st.integers(0, 1500), st.integers(0, 700))


@given(st.one_of(INDICES, RUNS, st.builds(list.__add__, INDICES, RUNS), st.builds(list.__add__, RUNS, RUNS)))
def test_a_bitmap_has_the_members_that_it_was_made_of(members: list[int]) -> None:
    bits = bitmap.of(members)
    assert list(bitmap.indices(bits)) == sorted(set(members))
    assert bits.bit_count() == len(set(members))
    assert all(bitmap.has(bits, index) for index in members)
