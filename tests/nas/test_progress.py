from __future__ import annotations

from dataclasses import replace

from nas.evaluate import Outcome
from nas.overhead import FakeEvaluator
from nas.progress import scored
from nas.search import Event
from search_spaces import load_space
from studies import CandidateState


def test_the_time_to_get_ready_is_shown_where_it_is_worth_saying() -> None:
    fake, arch = FakeEvaluator(), load_space("small").anchor()
    latency = fake.measure(arch)
    outcome = Outcome(CandidateState.COMPLETE, fake.cost(arch), 1.0, latency=latency, proxy=fake.train(arch))
    event = Event(arch, outcome, 1, 2, 0.5, 1, 0.3, None)
    assert scored(event).endswith("ms")
    slow = replace(outcome, latency=replace(latency, ready_seconds=3.21))
    assert scored(replace(event, outcome=slow)).endswith("ms  ready in 3.2 s")
