"""What a run remembers beside its adapter, through JSON and back: it decides as if it had never been away."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from sfl.adapters.state import AdapterKey
from sfl.device.feedback import RateController
from sfl.device.link_meter import LinkMeter
from sfl.device.run_state import Pending, RunState, new_session
from sfl.device.trainer import Figures
from sfl.device.triggers import UploadRule, upload_rule
from sfl.v1.federation_pb2 import DEVICE, Feedback, Link, NetworkSense, Periodic, Triggered, UpdateHeader, UploadPolicy

POLICIES = {
    "rounds": UploadPolicy(periodic=Periodic(local_steps=3)),
    "triggers": UploadPolicy(
        triggered=Triggered(
            alpha=0.9, beta=1.0, min_steps=2, max_steps=9, validate_every=3, threshold=0.1, threshold_growth=1.5,
            threshold_decay=0.8, reference_every=5, metric="loss", network=NetworkSense(budget=0.1, lowest=0.5, highest=4),
        )
    ),
}  # fmt: skip


def through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


def live(rule: UploadRule, chance: random.Random, steps: int) -> list[Any]:
    """What a rule decides in a run that is random, but the same for the same `chance`."""
    said: list[Any] = []
    for _ in range(steps):
        if rule.factor != 1 or chance.random() < 0.5:
            rule.sense(chance.uniform(0.01, 2), 1.0)
        due = rule.validation_due()
        figures = Figures(chance.uniform(0.5, 1), 10, 0.5, 0.5) if due else None
        trigger = rule.after_step({0: chance.lognormvariate(0, 1), 1 << 20: chance.lognormvariate(1, 1)}, figures)
        if trigger is not None:
            rule.after_upload()
        if chance.random() < 0.1:
            rule.after_adoption(Figures(chance.uniform(0.5, 1), 10, 0.5, 0.5) if rule.reference_due() else None)
        said.append((due, trigger, rule.factor))
    return said


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(5))
def test_a_rule_goes_on_where_it_was(name: str, seed: int) -> None:
    rule, chance = upload_rule(POLICIES[name]), random.Random(seed)
    live(rule, chance, 20 + seed)
    state, place = through_json(rule.state()), chance.getstate()
    expected = live(rule, chance, 40)
    assert any(trigger for _, trigger, _ in expected)
    again = upload_rule(POLICIES[name])
    again.restore(state)
    chance.setstate(place)
    assert live(again, chance, 40) == expected


def test_a_rate_controller_goes_on_where_it_was() -> None:
    feedback = Feedback(decrease=0.5, increase=1.5, lowest=0.2, patience=2, margin=0.1)
    chance = random.Random(3)
    losses = [chance.uniform(0.5, 1.5) for _ in range(30)]
    for kept_after in (0, 1, 7):
        whole, again = RateController(feedback), RateController(feedback)
        for loss in losses[:kept_after]:
            whole.look(loss)
        again.restore(through_json(whole.state()))
        for loss in losses[kept_after:]:
            whole.look(loss)
            again.look(loss)
            assert again.factor == whole.factor


def test_a_link_meter_goes_on_where_it_was() -> None:
    meter, again, chance = LinkMeter(), LinkMeter(), random.Random(1)
    for _ in range(8):
        meter.uploaded(chance.randrange(1000, 9000), chance.uniform(0.1, 3), chance.randrange(3))
        meter.answered(chance.uniform(0.01, 0.2))
    again.uploaded(1, 1, 1)
    again.restore(through_json(meter.state()))
    for _ in range(6):
        assert (again.upload_s(5000), again.latest, again.report()) == (meter.upload_s(5000), meter.latest, meter.report())
        size, seconds = chance.randrange(1000, 9000), chance.uniform(0.1, 3)
        for each in (meter, again):
            each.uploaded(size, seconds, 0)
            each.answered(seconds / 10)


@pytest.mark.parametrize("pending", [False, True])
def test_counts_and_the_half_that_is_not_sent(pending: bool) -> None:
    state = RunState("device-1-ab", steps=7, examples=50, pending_steps=2, waiting=True, step_seconds=[0.1, 1 / 3], bytes_sent=9)
    if pending:
        header = UpdateHeader(submission="device-1-ab/1", device="device-1", half=DEVICE, version=3, link=Link(bytes_per_s=0.1))
        state.pending = Pending(
            header, "gradient", {AdapterKey(0, "q", "A"): np.arange(6, dtype="f4").reshape(2, 3)}, answered=False
        )
    document, tensors = state.saved()
    back = RunState.restored(through_json(document), tensors)
    assert vars(back) | {"pending": None} == vars(state) | {"pending": None}
    if not pending:
        assert back.pending is None and tensors == {}
        return
    assert back.pending is not None and state.pending is not None
    assert (back.pending.header, back.pending.trigger) == (state.pending.header, "gradient")
    assert back.pending.progress.keys() == state.pending.progress.keys()
    assert all(np.array_equal(back.pending.progress[key], value) for key, value in state.pending.progress.items())
    assert back.pending.answered  # for all that it knows
    assert not back.sent(7) and RunState("s", steps=7).sent(7) and not RunState("s", steps=6).sent(7)


def test_no_two_sessions_have_one_name() -> None:
    assert len({new_session("device-1") for _ in range(100)}) == 100
    assert new_session("device-1").startswith("device-1-")
