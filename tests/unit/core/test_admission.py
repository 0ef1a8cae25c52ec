"""Who is let in, who waits and who is refused, on a small model of a server."""

from __future__ import annotations

import heapq
import itertools

import pytest

from baton.services.core.admission import AdmissionControl, AdmissionLimits, Visit
from baton.services.core.errors import BatonError, ErrorCode
from baton.services.core.slo import SloClass


def interactive(ttft_s: float | None = 1.0, tpot_s: float | None = 0.1, *, num_tokens: int = 100) -> Visit:
    return Visit(SloClass.INTERACTIVE, num_tokens, 1, ttft_s, tpot_s)


def batch(num_tokens: int = 100) -> Visit:
    return Visit(SloClass.BATCH, num_tokens, 1, None, None)


class Server:
    """Prompts one after the other, a millisecond a token; a token of each stream takes 2 ms and 4 more for each stream.

    ``slowness`` multiplies all of it.
    """

    ANSWER = 20

    def __init__(self, control: AdmissionControl, slowness: float = 1.0) -> None:
        self.control = control
        self.slowness = slowness
        self.now = 0.0
        self.met: list[bool] = []
        self.refusals: list[BatonError] = []
        self.most_streams = 0
        self._prefill_free_s = 0.0
        self._num_streams = 0
        self._events: list[tuple[float, int, str, Visit]] = []
        self._order = itertools.count()

    def arrive(self, visit: Visit) -> None:
        try:
            if self.control.arrive(visit, self.now):
                self._begin(visit)
        except BatonError as refusal:
            self.refusals.append(refusal)

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now, _, what, visit = heapq.heappop(self._events)
            if what == "first":
                self.control.progress(visit, 1, self.now)
                self._num_streams += 1
                self.most_streams = max(self.most_streams, self._num_streams)
                tpot_s = self.slowness * (0.002 + 0.004 * self._num_streams)
                self._at(self.now + tpot_s * (self.ANSWER - 1), "end", visit)
                continue
            self._num_streams -= 1
            self._judge(visit)
            self.control.progress(visit, self.ANSWER, self.now)
            for entered in self.control.end(visit, self.now):
                self._begin(entered)
        self.now = until_s

    def _begin(self, visit: Visit) -> None:
        self._prefill_free_s = max(self.now, self._prefill_free_s) + self.slowness * 0.001 * visit.num_tokens
        self._at(self._prefill_free_s, "first", visit)

    def _at(self, when_s: float, what: str, visit: Visit) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), what, visit))

    def _judge(self, visit: Visit) -> None:
        assert visit.first_token_s is not None
        ttft_s = visit.first_token_s - visit.arrival_s
        tpot_s = (self.now - visit.first_token_s) / (self.ANSWER - 1)
        in_time = visit.ttft_s is None or ttft_s <= visit.ttft_s
        self.met.append(in_time and (visit.tpot_s is None or tpot_s <= visit.tpot_s))


def load(server: Server, rate: float, for_s: float, **targets: float) -> int:
    """An open loop; returns how many were in time."""
    before = sum(server.met)
    start_s = server.now
    for number in range(int(rate * for_s)):
        server.run(start_s + number / rate)
        server.arrive(interactive(**targets))
    server.run(server.now + 5.0)
    return sum(server.met) - before


def test_where_there_is_room_everybody_is_let_in() -> None:
    server = Server(AdmissionControl())
    assert load(server, 4.0, 30.0) == 120
    assert not server.refusals


@pytest.mark.parametrize("targets", [{"ttft_s": 1.0, "tpot_s": 0.05}, {"ttft_s": 0.5, "tpot_s": 1.0}])
def test_at_three_times_what_can_be_served_as_much_is_in_time_as_at_the_best_rate(targets: dict[str, float]) -> None:
    peak = max(load(Server(AdmissionControl()), rate, 60.0, **targets) for rate in (5.0, 6.0, 7.0, 8.0, 9.0, 10.0))
    server = Server(AdmissionControl())
    assert load(server, 27.0, 60.0, **targets) >= 0.9 * peak
    assert sum(server.met) >= 0.95 * len(server.met), "who is let in is served in time"
    assert server.refusals


def test_without_admission_the_same_load_is_in_time_for_nobody() -> None:
    """Otherwise the test above would say little."""
    server = Server(AdmissionControl(AdmissionLimits(always=1_000_000)))
    assert load(server, 27.0, 60.0) <= 0.1 * 27 * 60


def test_a_refusal_says_when_to_come_back_and_the_longer_the_more_waits() -> None:
    server = Server(AdmissionControl())
    load(server, 5.0, 20.0)
    for _ in range(40):
        server.arrive(interactive(ttft_s=30.0, tpot_s=10.0, num_tokens=500))
    for num_tokens in (100, 5000):
        server.arrive(interactive(ttft_s=1.0, tpot_s=10.0, num_tokens=num_tokens))
    few, many = server.refusals[-2:]
    assert few.code is ErrorCode.OVERLOADED
    assert few.retry_after_s is not None
    assert many.retry_after_s is not None
    assert few.retry_after_s > 0.0
    server.run(server.now + few.retry_after_s + 1.0)
    before = len(server.refusals)
    server.arrive(interactive(ttft_s=1.0, tpot_s=10.0))
    assert len(server.refusals) == before, "and then it is let in"


def test_who_waits_is_let_in_by_urgency_as_others_end() -> None:
    control = AdmissionControl(AdmissionLimits(always=1))
    _teach_tpot(control, at_one_s=0.1)
    inside = interactive(tpot_s=0.1)
    assert control.arrive(inside, 10.0)
    assert control.arrive(second := interactive(tpot_s=0.1), 10.0), "twice what it takes alone is allowed"
    patient, urgent, nobodys = interactive(ttft_s=9.0, tpot_s=0.1), interactive(ttft_s=4.0, tpot_s=0.1), batch()
    assert [control.arrive(visit, 10.1) for visit in (nobodys, patient, urgent)] == [False] * 3
    assert control.end(inside, 11.0) == [urgent]
    assert control.end(second, 11.1) == [patient]
    assert control.end(urgent, 11.2) == [nobodys], "batch has half of the room"


def _teach_tpot(control: AdmissionControl, *, at_one_s: float) -> None:
    """A stream's token takes so long alone, and twice as long beside another."""
    for number in range(20):
        visits = [interactive(None, None, num_tokens=1) for _ in range(1 + number % 2)]
        for visit in visits:
            control.arrive(visit, 0.0)
            control.progress(visit, 1, 0.0)
        for visit in visits:
            control.progress(visit, 11, 10 * at_one_s * len(visits))
        for visit in visits:
            control.end(visit, 10 * at_one_s * len(visits))


def test_prompts_that_can_be_computed_elsewhere_take_no_seat() -> None:
    def num_let_in(pace_s: float, prompt_share: float) -> int:
        control = AdmissionControl()
        control.prompt_share = prompt_share
        _teach_tpot(control, at_one_s=pace_s)
        visits = [interactive(None, 0.1, num_tokens=1) for _ in range(50)]
        return sum(control.arrive(visit, 1000.0) for visit in visits)

    assert num_let_in(0.01, 0.0) == 7, "seven of them take 0.7 of a tenth of a second"
    assert num_let_in(0.02, 0.0) == 3
    assert num_let_in(0.02, 0.5) == 7, "the streams alone are as quick"


def test_batch_waits_for_room_and_leaves_half_of_it() -> None:
    server = Server(AdmissionControl())
    load(server, 5.0, 20.0, tpot_s=0.05)
    for _ in range(60):
        server.arrive(batch())
    server.run(server.now + 0.5)
    assert not server.refusals
    assert server.control.num_waiting > 0
    inside = server.control.num_streams
    for _ in range(3):
        server.arrive(interactive(ttft_s=5.0, tpot_s=0.2))
    assert server.control.num_streams >= inside + 3, "who is in a hurry finds room beside it"
    server.run(server.now + 60.0)
    assert server.control.num_waiting == 0


def test_batch_that_waited_for_long_enough_has_its_turn_under_any_load() -> None:
    server = Server(AdmissionControl(AdmissionLimits(batch_patience_s=10.0)))
    load(server, 9.0, 20.0, tpot_s=0.05)
    waiting = [batch() for _ in range(12)]
    for number in range(600):
        server.run(server.now + 1 / 20)
        server.arrive(interactive(tpot_s=0.05))
        if number == 20:
            for visit in waiting:
                server.arrive(visit)
    assert all(visit.admitted_s is not None for visit in waiting)


def test_what_waits_is_bounded() -> None:
    control = AdmissionControl(AdmissionLimits(always=1, max_waiting=5))
    _teach_tpot(control, at_one_s=0.1)
    for _ in range(2):
        assert control.arrive(interactive(None, 0.1), 10.0)
    while control.num_waiting < 5:
        control.arrive(batch(), 0.0)
    with pytest.raises(BatonError, match="5 requests wait already"):
        control.arrive(batch(), 0.0)
    assert control.num_waiting == 5


def test_a_target_that_nobody_could_meet_refuses_nobody_where_nobody_waits() -> None:
    server = Server(AdmissionControl(), slowness=50.0)
    load(server, 0.05, 200.0)
    server.arrive(interactive(ttft_s=0.001, tpot_s=0.0001))
    assert not server.refusals


def test_prompts_of_other_gateways_count() -> None:
    server = Server(AdmissionControl(AdmissionLimits(always=1)))
    load(server, 3.0, 20.0)
    server.control.arrive(interactive(tpot_s=None), server.now)
    with pytest.raises(BatonError, match="first token"):
        server.control.arrive(interactive(tpot_s=None), server.now, others_tokens=100_000)


def test_who_leaves_while_waiting_is_forgotten() -> None:
    control = AdmissionControl(AdmissionLimits(always=1))
    _teach_tpot(control, at_one_s=0.1)
    inside = interactive(None, 0.1)
    control.arrive(inside, 0.0)
    gone = [batch() for _ in range(8)]
    for visit in gone:
        control.arrive(visit, 0.0)
    for visit in gone:
        control.end(visit, 1.0)
    assert control.end(inside, 1.0) == []
    assert control.end(inside, 1.0) == [], "a second end is ignored"
    assert (control.num_waiting, control.num_streams, control.ahead_tokens) == (0, 0, 0)


def test_a_pace_counts_for_those_who_were_beside_it_not_for_who_came_at_its_end() -> None:
    control = AdmissionControl()
    first = interactive(None, None)
    control.arrive(first, 0.0)
    control.progress(first, 1, 0.0)
    for _ in range(9):
        control.arrive(other := interactive(None, None), 0.7)
        control.progress(other, 1, 0.79)
    control.progress(first, 9, 0.8)
    assert not control.arrive(interactive(ttft_s=None, tpot_s=0.2), 0.8), "one took 100 ms: eleven would take far more"


def test_where_nothing_has_ended_for_long_nobody_is_made_to_wait_for_a_moment() -> None:
    control = AdmissionControl(AdmissionLimits(always=1))
    _teach_tpot(control, at_one_s=0.1)
    control.arrive(interactive(None, None), 99.9)
    for number in range(200):
        visit = interactive(None, None)
        control.arrive(visit, 100.0 + 0.01 * number)
        control.progress(visit, 1, 100.0 + 0.01 * number)
        control.end(visit, 100.0 + 0.01 * number)
    assert control.arrive(interactive(tpot_s=0.1), 102.0)
    assert not control.arrive(interactive(tpot_s=0.1), 102.1), "something ends every 10 ms"
    with pytest.raises(BatonError, match="its turn would come"):
        control.arrive(interactive(tpot_s=0.1), 104.0)


def test_who_began_together_ends_together_and_until_then_there_is_no_turn() -> None:
    """However quickly others ended before."""
    control = AdmissionControl(AdmissionLimits(always=1))
    _teach_tpot(control, at_one_s=0.01)
    for number in range(200):
        visit, begin_s = interactive(None, None), 100.0 + 0.01 * number
        control.arrive(visit, begin_s)
        control.progress(visit, 1, begin_s)
        control.progress(visit, 101, begin_s + 1.0)
        control.end(visit, begin_s + 1.0)
    inside = []
    while control.arrive(visit := interactive(ttft_s=30.0, tpot_s=0.1), 110.0):
        inside.append(visit)
        control.progress(visit, 1, 110.0)
    pace_s = control._tpot.at(len(inside))
    assert 100 * pace_s > 2.0
    with pytest.raises(BatonError, match="its turn would come") as refusal:
        control.arrive(interactive(ttft_s=1.0, tpot_s=0.1), 110.0)
    assert refusal.value.retry_after_s == pytest.approx(100 * pace_s, rel=0.5)


def test_how_slow_it_is_for_many_does_not_count_as_how_slow_it_is_for_one() -> None:
    """Else a crowd would be a reason to let in more."""
    control = AdmissionControl()
    for number, (crowd, ttft_s) in enumerate([(1, 0.1)] * 10 + [(20, 3.0)] * 10):
        now_s = 100.0 * number
        visits = [interactive(None, None) for _ in range(crowd)]
        for visit in visits:
            control.arrive(visit, now_s)
        for visit in visits:
            control.progress(visit, 1, now_s + ttft_s)
            control.end(visit, now_s + ttft_s)
    for _ in range(12):
        control.arrive(interactive(None, None), 5000.0)
    with pytest.raises(BatonError, match="first token"):
        control.arrive(interactive(), 5000.0)


def test_under_pressure_seats_are_given_at_the_rate_at_which_they_are_left() -> None:
    """Else what began together ends together: all prompts would be computed at one time, and all answers at another."""
    control = AdmissionControl(AdmissionLimits(always=1))
    _teach_tpot(control, at_one_s=0.01)
    inside = []
    while control.arrive(visit := interactive(ttft_s=30.0, tpot_s=0.1), 10.0):
        inside.append(visit)
    waiting = [visit, interactive(ttft_s=30.0, tpot_s=0.1)]
    assert not control.arrive(waiting[1], 10.0)
    for visit in inside[1:]:
        assert control.end(visit, 10.001) == []
    wake_s = control.wake_s
    assert wake_s is not None
    assert wake_s > 10.001
    assert control.look(10.001) == []
    assert control.look(wake_s) == waiting[:1]
    assert (later_s := control.wake_s) is not None
    assert control.look(later_s) == waiting[1:]
    assert control.wake_s is None


# Priorities.


def waiting(control: AdmissionControl, *asked: tuple[str, int]) -> list[Visit]:
    """Of tenants, with priorities, one after the other, while a seat's owner runs."""
    visits = [Visit(SloClass.BATCH, 10, 1, None, None, tenant=tenant, priority=priority) for tenant, priority in asked]
    assert [control.arrive(visit, float(number)) for number, visit in enumerate(visits)] == [False] * len(visits)
    return visits


def order(control: AdmissionControl, visits: list[Visit]) -> list[int]:
    """In which they are let in, as numbers of ``visits``."""
    return [visits.index(visit) for visit in control._in_order(control._waiting, 50.0)]


@pytest.fixture
def full() -> AdmissionControl:
    """One in which batch has to wait."""
    control = AdmissionControl(AdmissionLimits(always=0, batch_share=0.0, max_waiting=100))
    control._tpot.observe(1.0, 0.05)
    control._tpot.observe(2.0, 0.10)
    return control


def test_a_tenants_priorities_say_which_of_its_requests_has_which_of_its_turns(full: AdmissionControl) -> None:
    visits = waiting(full, ("a", 0), ("b", 0), ("a", 5), ("a", -5), ("b", 9), ("b", 0))
    # The turns are a b a a b b, whatever the priorities are.
    assert order(full, visits) == [3, 1, 0, 2, 5, 4]


def test_without_priorities_the_order_is_that_of_arrival(full: AdmissionControl) -> None:
    visits = waiting(full, ("a", 0), ("b", 0), ("a", 0), ("b", 0))
    assert order(full, visits) == [0, 1, 2, 3]
    assert full._num_before(Visit(SloClass.BATCH, 10, 1, None, None, arrival_s=9.0, order=9), 50.0) == 4


def test_classes_of_one_tenant_do_not_mix(full: AdmissionControl) -> None:
    (patient,) = waiting(full, ("a", -9))
    urgent = Visit(SloClass.INTERACTIVE, 10, 1, 60.0, None, tenant="a", priority=9, arrival_s=9.0, order=9)
    assert full._num_before(urgent, 10.0) == 0
    assert full._in_order([patient, urgent], 10.0) == [urgent, patient]
