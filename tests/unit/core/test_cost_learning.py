"""What workers cost: from a profile, then from what was seen, bounded and forgetful."""

from __future__ import annotations

import pytest

from baton.services.core.cost_learning import HALF_LIFE_S, CostBook, Profile, fit_decode
from baton.services.core.cost_model import DEFAULT_PREFILL_S_PER_TOKEN, DecodeCost, WorkerCost, interpolate

PROFILE = Profile(((16, 0.010), (256, 0.050), (2048, 0.400)), DecodeCost(0.008, 0.001))


def cost(book: CostBook, incarnation: str = "a", now: float = 0.0, reported: float = 0.0) -> WorkerCost:
    return book.cost(incarnation, "prefill", prefill_s_per_token=reported, decode_step_s=0.0, now=now)


def test_a_curve_is_flat_before_its_first_point_and_goes_on_behind_its_last() -> None:
    curve = PROFILE.prefill
    assert interpolate(curve, 1) == interpolate(curve, 16) == 0.010
    assert interpolate(curve, 136) == pytest.approx(0.030)
    assert interpolate(curve, 2048 + 1792) == pytest.approx(0.750)
    assert interpolate(((100, 0.1),), 200) == pytest.approx(0.2)


def test_without_anything_known_the_reports_count() -> None:
    assert cost(CostBook()).prefill_s(1000) == pytest.approx(1000 * DEFAULT_PREFILL_S_PER_TOKEN)
    assert cost(CostBook(), reported=1e-3).prefill_s(1000) == pytest.approx(1.0)


def test_a_profile_counts_until_something_was_seen_and_beside_it() -> None:
    book = CostBook({"prefill": PROFILE})
    assert cost(book).prefill_s(256) == pytest.approx(0.050)
    assert cost(book).step_s(10) == pytest.approx(0.018)
    for _ in range(20):
        book.on_prefill("a", "prefill", 256, 0.100, now=0.0)
    assert cost(book).prefill_s(256) == pytest.approx(0.100, rel=0.1)
    assert cost(book).prefill_s(16) == pytest.approx(0.010)  # of its length nothing was seen


def test_an_outlier_moves_little_and_never_by_more_than_four_times() -> None:
    book = CostBook()
    for _ in range(10):
        book.on_prefill("a", "prefill", 256, 0.1, now=0.0)
    before = cost(book).prefill_s(256)
    book.on_prefill("a", "prefill", 256, 1000.0, now=0.0)
    assert before < cost(book).prefill_s(256) < 1.5 * before
    book.on_prefill("a", "prefill", 0, 5.0, now=0.0)
    book.on_prefill("a", "prefill", 256, 0.0, now=0.0)  # a clock that stood still
    assert cost(book).prefill_s(256) < 1.5 * before


def test_a_new_worker_is_priced_like_its_pool_and_then_by_its_own_speed() -> None:
    book = CostBook()
    for _ in range(8):
        book.on_prefill("slow", "prefill", 256, 0.4, now=0.0)
    assert cost(book, "new").prefill_s(256) == pytest.approx(0.4)
    for _ in range(8):
        book.on_prefill("new", "prefill", 256, 0.1, now=0.0)
    assert cost(book, "new").prefill_s(256) < 0.2 < cost(book, "slow").prefill_s(256)


def test_decode_workers_are_taken_to_prefill_like_those_that_do_until_they_have() -> None:
    book = CostBook()
    for _ in range(8):
        book.on_prefill("p", "prefill", 256, 0.4, now=0.0)
        book.on_decode("d", "decode", 4, 0.02, now=0.0)

    def decode_cost() -> WorkerCost:
        return book.cost("d", "decode", prefill_s_per_token=0.0, decode_step_s=0.0, now=0.0)

    assert decode_cost().prefill_s(256) == pytest.approx(0.4)
    book.on_prefill("d", "decode", 256, 0.2, now=0.0)
    assert decode_cost().prefill_s(256) == pytest.approx(0.2)


def test_longer_prompts_never_cost_less_whatever_the_noise_says() -> None:
    book = CostBook()
    for num_tokens, seconds in ((16, 0.2), (64, 0.05), (1024, 0.1), (4096, 0.9)):
        book.on_prefill("a", "prefill", num_tokens, seconds, now=0.0)
    curve = cost(book).curve
    assert [point[0] for point in curve] == sorted({point[0] for point in curve})
    assert [point[1] for point in curve] == sorted(point[1] for point in curve)


def test_curiosity_goes_with_what_is_known_and_comes_back_when_that_is_old() -> None:
    book = CostBook()
    shares = [cost(book).curiosity]
    for _ in range(5):
        book.on_prefill("a", "prefill", 256, 0.1, now=0.0)
        shares.append(cost(book).curiosity)
    assert shares[0] > 0
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == 0.0
    assert cost(book, now=5 * HALF_LIFE_S).curiosity > 0


def test_what_is_long_past_gives_way_to_one_new_observation() -> None:
    old, new = CostBook(), CostBook()
    for book, then in ((old, -20 * HALF_LIFE_S), (new, 0.0)):
        for _ in range(16):
            book.on_prefill("a", "prefill", 256, 0.4, now=then)
        book.on_prefill("a", "prefill", 256, 0.1, now=0.0)
    assert cost(old).prefill_s(256) < 0.15 < 0.3 < cost(new).prefill_s(256)


def test_a_step_is_a_base_and_a_part_for_each_sequence() -> None:
    book = CostBook()
    for _ in range(30):
        for batch in (1, 4, 16, 60):
            book.on_decode("a", "prefill", batch, 0.010 + batch * 0.0005, now=0.0)
    learned = cost(book)
    for batch in (2, 8, 32):
        assert learned.step_s(batch) == pytest.approx(0.010 + batch * 0.0005, rel=0.05)
    assert learned.growth_s(10, 256) == pytest.approx(0.005, rel=0.1)


def test_a_fit_has_neither_a_negative_base_nor_a_negative_slope() -> None:
    assert fit_decode([(1, 0.02), (64, 0.01)]).per_sequence_s == 0.0
    falling = fit_decode([(10, 0.001), (20, 0.1)])
    assert falling.base_s >= 0.0


def test_workers_that_are_gone_are_forgotten_and_their_pool_remembers() -> None:
    book = CostBook()
    for _ in range(8):
        book.on_prefill("a", "prefill", 256, 0.4, now=0.0)
    book.forget_all_but(["b"])
    assert book.num_observed("a", 0.0) == 0
    assert cost(book, "b").prefill_s(256) == pytest.approx(0.4)


def gap(book: CostBook, incarnation: str = "d0", now: float = 0.0) -> float | None:
    return book.cost(incarnation, "decode", prefill_s_per_token=0.0, decode_step_s=0.0, now=now).gap_s


def test_the_gap_around_handoffs_is_what_most_of_them_keep_to() -> None:
    book = CostBook()
    assert gap(book) is None
    for number in range(20):
        book.on_handoff("d0", "decode", 0.02 + 0.02 * (number % 2), float(number) / 10)
    learned = gap(book, now=2.0)
    assert learned is not None
    assert 0.03 < learned < 0.05, "the mean and the mean distance from it"
    assert gap(book, "another", 2.0) == pytest.approx(learned, rel=0.1), "its pool's"


def test_what_is_known_of_handoffs_is_forgotten_within_minutes_so_that_they_are_tried_again() -> None:
    book = CostBook()
    book.on_handoff("d0", "decode", 0.5, 0.0)
    assert gap(book, now=100.0) == pytest.approx(0.5)
    assert gap(book, now=150.0) is None
    book.on_handoff("d0", "decode", 0.02, 150.0)
    assert gap(book, now=150.0) == pytest.approx(0.02), "nothing is left of what was forgotten"


def test_a_prefill_worker_that_has_answered_nothing_is_taken_to_step_as_quickly_as_decode_workers() -> None:
    book = CostBook()
    for batch, step_s in ((1, 0.011), (4, 0.014), (1, 0.011), (4, 0.014)):
        book.on_decode("d0", "decode", batch, step_s, 0.0)
    assert cost(book, "p0").step_s(2) == pytest.approx(0.012, rel=0.05)
    for batch in (1, 2) * 8:
        book.on_decode("p0", "prefill", batch, 0.03, 0.0)
    assert cost(book, "p0").step_s(1) > 0.02
