"""Device or edge may die between any two messages: the adapter that comes of it is the same, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.device.mortal import FAULTS, Fault, Outcome, live_through, same
from tests.edge_server.made import Halves

STRATEGIES: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg", "local_steps": 3},
    "gsfs": {"name": "gsfs", "beta": 0.0, "min_steps": 2, "max_steps": 3, "validate_every": 2},
}

OFFSETS: dict[str, tuple[float, ...]] = {"fedavg": (), "gsfs": (0.5, -0.25, 1.5)}

EVERY = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])


@pytest.fixture(scope="module")
def halves() -> Halves:
    return Halves(dropout=0.3)


def losses_of(folder: Path) -> dict[int, float]:
    """Loss by step; a step that was repeated must have come to the same."""
    found: dict[int, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "step":
            assert found.setdefault(event["step"], event["loss"]) == event["loss"], f"step {event['step']} came out differently"
    return found


def require_same(found: Outcome, expected: Outcome) -> None:
    assert found.losses == expected.losses
    assert sorted(found.submitted) == sorted(expected.submitted)
    assert len(found.versions) == len(expected.versions)
    assert all(map(same, found.versions, expected.versions))
    assert same(found.local, expected.local)


@pytest.mark.parametrize("strategy", STRATEGIES)
@EVERY
def test_a_death_between_any_two_messages_changes_nothing(
    tmp_path: Path, halves: Halves, strategy: str, every: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each event one kind of death, in turn, or all kinds."""
    monkeypatch.setattr("sfl.disk.sync", lambda path: None)  # the machine does not die with them
    told: dict[str, Any] = {"losses_of": losses_of, "offsets": OFFSETS[strategy]}
    expected = live_through(tmp_path / "undisturbed", halves, STRATEGIES[strategy], monkeypatch, **told)
    assert expected.lives == 1
    if OFFSETS[strategy]:
        without = live_through(tmp_path / "without", halves, STRATEGIES[strategy], monkeypatch, losses_of=losses_of)
        assert all(without.losses[step] != loss for step, loss in expected.losses.items())
    assert len(expected.losses) == 7 and len(expected.versions) >= 3
    for at in range(len(expected.events)):
        for what in FAULTS if every else FAULTS[at % len(FAULTS) :][:1]:
            folder = tmp_path / f"{at} {what}"
            found = live_through(folder, halves, STRATEGIES[strategy], monkeypatch, Fault(what, at), **told)
            try:
                require_same(found, expected)
            except AssertionError as error:
                raise AssertionError(f"{what} event {at}, {expected.events[at]}: {error}; {found.events}") from error


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dies", ["edge", "both"])
@EVERY
def test_a_device_moves_on_where_an_edge_has_lost_its_disk(
    tmp_path: Path, halves: Halves, strategy: str, dies: str, every: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is counted twice, all steps are done, and both halves stem from one version at each of them."""
    monkeypatch.setattr("sfl.disk.sync", lambda path: None)
    expected = live_through(tmp_path / "undisturbed", halves, STRATEGIES[strategy], monkeypatch, losses_of=losses_of)
    steps = [at for at, event in enumerate(expected.events) if event == "edge step"]
    for at in range(steps[2] + 1, len(expected.events), 1 if every else 4):  # before that there may be nothing to lose
        folder = tmp_path / str(at)
        found = live_through(folder, halves, STRATEGIES[strategy], monkeypatch, Fault(f"{dies} lost", at), checkpoint_steps=2)
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        moves = [event for event in events if event["event"] == "move"]
        assert len(moves) <= 1, events
        if expected.events[at] not in ("edge close", "fed trained") and not expected.events[at].startswith("fed submit"):
            assert moves, f"{at} {expected.events[at]}"
        assert {event["step"] for event in events if event["event"] == "step"} == set(range(1, 8))
        whole = {submission for half, submission in found.submitted if half == "device"} & {
            submission for half, submission in found.submitted if half == "edge"
        }
        assert len(found.versions) == len(whole) + 1, found.submitted
