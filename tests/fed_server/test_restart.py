"""A federation server that is killed at any file operation, and started anew in the same folder: it is as if nothing had been."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfl.adapters.peft_format import AdapterWriteError
from sfl.adapters.state import AdapterState, device_half, edge_half
from sfl.errors import StateWriteError, UnknownMemberError
from sfl.fed_server import contents, ledger, roster_file
from sfl.fed_server.coordinator import Federation
from sfl.fed_server.members import Member
from sfl.fed_server.versions import VersionStore, version_numbers
from sfl.settings import FedSettings
from sfl.state_file import read_state
from sfl.telemetry import MetricsWriter
from tests.fed_server.faulty_disk import Disk, Killed, faulty
from tests.fed_server.made import PLACEMENT, Clock, adapter, device, edge, half, same

Call = Callable[[Federation], object]


class World:
    """Members of a federation, and a server that is started anew whenever it was killed.

    Members do what daemons do: they watch, join again where they are not known, and ask again what was not answered.
    """

    def __init__(self, out: Path, disk: Disk | None = None, **settings: Any) -> None:
        self.out = out
        self._disk = disk or Disk(out)
        self.acknowledged: list[tuple[str, str, str]] = []  # device, submission and half
        self._settings = FedSettings.model_validate({"out": out, **settings})
        self._clock = Clock()
        self._members: dict[str, Member] = {}
        self._server: Federation | None = None

    @property
    def server(self) -> Federation:
        if self._server is None:
            server = Federation(self._settings, VersionStore(self.out / "adapters"), MetricsWriter(None), self._clock, self.out)
            server.tick()
            for name in self._members:
                self._comes_back(server, name)
            self._server = server
        return self._server

    def _comes_back(self, server: Federation, name: str) -> None:
        try:
            server.watch_begins(name)
        except UnknownMemberError:
            server.join(self._members[name])
            server.watch_begins(name)

    def ask(self, call: Call) -> None:
        """Until it is answered. A disk that is full is so for one more second, and then there is room again."""
        for _ in range(50):
            try:
                call(self.server)
                break
            except Killed:
                self._server = None
            except (AdapterWriteError, StateWriteError):
                self._make_room()
        else:
            raise AssertionError("it is never answered")
        if self._disk.full:
            self._make_room()

    def _make_room(self) -> None:
        if self._server is not None:
            self._server.tick()
        self._disk.full = False
        self.tick()

    def join(self, member: Member) -> None:
        self.ask(lambda server: server.join(member))
        self._members[member.name] = member
        self.ask(lambda server: server.watch_begins(member.name))

    def submit(self, name: str, role: Any, submission: str, version: int, state: AdapterState) -> None:
        header = half(role, name, submission, version, examples=8, steps=2)
        part = (device_half if role == "device" else edge_half)(state, self._members[name].cut)
        self.ask(lambda server: server.submit(header, part))
        self.acknowledged.append((name, submission, role))

    def fetch(self, name: str, version: int) -> None:
        """This version or, if it is not there yet, the newest."""
        self.ask(lambda server: server.fetch(name, min(version, server.version or 0)))

    def leave(self, name: str) -> None:
        self.ask(lambda server: server.trained(name))
        self.ask(lambda server: server.leave(name))
        del self._members[name]

    def tick(self) -> None:
        self.ask(lambda server: server.tick())

    def pass_time(self, seconds: float) -> None:
        self._clock.now += seconds
        self.tick()


def play(world: World, *rounds: list[tuple[str, str, int]]) -> None:
    """Everybody joins, submits, halves of different devices in between each other, and leaves. Who has submitted fetches the
    version that its next update stems from."""
    for member in (device("a"), device("b", cut=2, examples=30), device("c"), edge()):
        world.join(member)
    world.ask(lambda server: server.propose("edge", PLACEMENT, adapter(0)))
    for number, made in enumerate(rounds):
        for role in ("edge", "device") if number % 2 else ("device", "edge"):
            for name, submission, version in made:
                world.submit(name, role, f"{name}-x/{submission}", version, adapter(hash_of(name, submission), 0.1))
        world.tick()
        for name, _, _ in made:
            following = (version for later in rounds[number + 1 :] for who, _, version in later if who == name)
            world.fetch(name, next(following, 0))
    world.submit("b", "device", "b-x/lost", 0, adapter(99))  # its other half never comes
    for name in "cab":
        world.leave(name)
    world.tick()


def hash_of(*words: str) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate("/".join(words))) % 10**6


QUORUM = [
    [("a", "1", 0), ("b", "1", 0)],
    [("a", "2", 0), ("c", "1", 0)],
    [("c", "2", 1), ("b", "2", 1), ("a", "3", 1)],
    [("c", "3", 0)],
]
ROUNDS = [[(name, str(number + 1), number) for name in names] for number, names in enumerate(["abc", "cab", "bca"])]
LAGGING = [  # a version for each, and a and b train on an old one for long
    [(name, submission, version)]
    for name, submission, version in [
        ("a", "1", 0), ("b", "1", 0), ("c", "1", 0), ("c", "2", 3), ("c", "3", 4), ("a", "2", 1), ("b", "2", 2), ("c", "4", 5),
        ("a", "3", 6), ("b", "3", 7),
    ]
]  # fmt: skip
GAMES: dict[str, tuple[dict[str, Any], list[list[tuple[str, str, int]]]]] = {
    "frequency": ({"strategy": {"name": "gsfs", "quorum": 0.6, "weights": "frequency"}}, QUORUM),
    "share": ({"strategy": {"name": "gsfs", "quorum": 1.0, "weights": "share", "reach": True}}, QUORUM),
    "moments": ({"strategy": {"name": "fedadam"}}, ROUNDS),
    "old versions removed": ({"strategy": {"name": "gsfs", "quorum": 0.1}, "merge": "fedex", "keep_versions": 1}, LAGGING),
    "factors of each version": ({"strategy": {"name": "gsfs", "quorum": 0.6, "keep_progress": False}, "merge": "flora"}, QUORUM),
}


@dataclasses.dataclass
class Outcome:
    """What there is at the end of a game."""

    operations: int
    versions: dict[int, AdapterState]  # that are kept
    held: dict[int, tuple[contents.Entry, ...]]  # by them
    removed: dict[int, list[tuple[str, str]]]  # what other versions held
    acknowledged: set[tuple[str, str]]  # whole submissions


def outcome(folder: Path, game: str, monkeypatch: pytest.MonkeyPatch, **faults: Any) -> Outcome:
    """Play `game` in `folder` on a disk with these faults."""
    settings, rounds = GAMES[game]
    folder.mkdir()
    disk = Disk(folder, **faults)
    with faulty(disk, monkeypatch), monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *arguments: None)  # what was killed in this process still has its files open
        world = World(folder, disk, **settings, devices=3)
        play(world, *rounds)
        world.server.close()
    assert disk.killed == len(faults.get("kills", ())), "an operation was never reached"
    assert read_state(folder / roster_file.FILE)[0]["finished"]
    store = VersionStore(folder / "adapters")
    newest = store.newest()
    assert newest is not None
    kept = sorted(version_numbers(store.folder))
    held = {number: made.submissions for number in kept if (made := contents.load(store.folder, number)) is not None}
    removed = removed_by(folder)
    assert held.keys() | removed.keys() == set(range(newest.number + 1))
    balance = ledger.check(folder)
    assert balance.problems == [], balance.problems
    halves = Counter((name, submission) for name, submission, _ in world.acknowledged)
    whole = {key for key, count in halves.items() if count == 2}
    there = {number: [(entry.device, entry.submission) for entry in entries] for number, entries in held.items()}
    assert sorted(key for keys in (removed | there).values() for key in keys) == sorted(whole), "each exactly once"
    assert not any(entry.refused for entries in held.values() for entry in entries)
    assert balance.refused == 0
    assert balance.accepted == len(whole) and balance.pooled == 0
    return Outcome(
        disk.operations,
        {number: store.load(number) for number in kept},
        held,
        removed,
        whole,
    )


def removed_by(folder: Path) -> dict[int, list[tuple[str, str]]]:
    """What the ledger tells of versions that were, or were about to be, removed."""
    lines = [json.loads(line) for line in (folder / ledger.FILE).read_text().splitlines()]
    return {line["version"]: [*map(tuple, line["submissions"])] for line in lines if line["event"] == "removed"}


def require_same(found: Outcome, expected: Outcome) -> None:
    """What could not be removed in time may be there besides."""
    assert found.versions.keys() >= expected.versions.keys()
    assert all(same(found.versions[number], state) for number, state in expected.versions.items())
    assert all(found.held[number] == entries for number, entries in expected.held.items())
    for number in found.versions.keys() - expected.versions.keys():
        assert [(entry.device, entry.submission) for entry in found.held[number]] == expected.removed[number]


STRIDE = 13  # operations between those at which a short test ends a server
WAYS: dict[str, Callable[[int], dict[str, Any]]] = {
    "killed": lambda operation: {"kills": [operation]},
    "power lost": lambda operation: {"kills": [operation], "power": True},
    "disk full": lambda operation: {"full_at": operation},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("stride", [STRIDE, pytest.param(1, marks=pytest.mark.slow)])
def test_whatever_happens_at_any_file_operation_it_is_as_if_nothing_had_been(
    tmp_path: Path, game: str, way: str, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outcome(tmp_path / "undisturbed", game, monkeypatch)
    assert max(expected.held) > 2 and len(expected.acknowledged) > 6
    assert bool(expected.removed) == (game == "old versions removed")
    first = 1 + (3 * [*GAMES].index(game) + [*WAYS].index(way)) % stride
    for operation in range(first, expected.operations + 1, stride):
        require_same(outcome(tmp_path / str(operation), game, monkeypatch, **WAYS[way](operation)), expected)


@pytest.mark.parametrize("seed", range(6))
def test_a_server_may_be_killed_again_and_again_also_while_it_starts(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, game = random.Random(seed), [*GAMES][seed % len(GAMES)]
    expected = outcome(tmp_path / "undisturbed", game, monkeypatch)
    kills = [chance.randint(1, 20) for _ in range(expected.operations // 20)]
    require_same(outcome(tmp_path / "killed", game, monkeypatch, kills=kills, power=bool(seed % 2)), expected)
