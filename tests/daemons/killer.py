"""Kills daemons with SIGKILL at random moments of a run, and starts each of them again."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Sequence

from sfl.cluster.metrics import Follower
from tests.daemons.processes import Daemons

_SOON_S = 2.0  # longest pause before a kill that does not wait for training to go on
_DOWN_S = 1.0  # longest time that a daemon is left dead
_STUCK_S = 90.0  # training is stuck when there was no step for so long
_LOOK_S = 0.02


class Killer:
    """Makes `count` kills of `devices` and `servers` while each of the devices makes `steps` steps; `seed` decides which and
    when.

    Moments are places in the steps of all devices, from the first to four fifths of them: so all kills fall into the run however
    fast it is, and there is always time for some steps in between. A third comes soon after the one before, wherever that is, as
    the first one comes soon after the start: they find daemons at their start, too, and others dead.
    """

    def __init__(
        self, daemons: Daemons, devices: Sequence[str], servers: Sequence[str], steps: int, count: int, seed: int
    ) -> None:
        self.kills: Counter[str] = Counter()
        self._daemons = daemons
        self._devices = devices
        self._servers = servers
        self._chance = random.Random(seed)
        self._followers = {name: Follower(daemons[name].out / "metrics.jsonl") for name in devices}
        self._reached = dict.fromkeys(devices, 0)  # steps
        self._learnt = time.monotonic()  # when the last new step was
        self._done: set[str] = set()
        self._down: dict[str, float] = {}  # when each is started again
        places = [self._chance.uniform(0, 0.8 * steps * len(devices)) for _ in range(count)]
        self._moments = [(place, number == 0 or self._chance.random() < 1 / 3) for number, place in enumerate(sorted(places))]

    def run(self) -> Counter[str]:
        """Kill, and see all devices to their end; how often each daemon was killed."""
        for place, soon in self._moments:
            self._wait(place, self._chance.uniform(0, _SOON_S) if soon else math.inf)
            victims = [name for name in (*self._devices, *self._servers) if name not in self._done and name not in self._down]
            if self._going and victims:
                self._kill(self._chance.choice(victims))
        while self._going or self._down:
            self._look()
            time.sleep(_LOOK_S)
        return self.kills

    @property
    def _going(self) -> bool:
        return len(self._done) < len(self._devices)

    def _kill(self, name: str) -> None:
        self._daemons[name].kill()
        self.kills[name] += 1
        self._down[name] = time.monotonic() + self._chance.choice((0.0, self._chance.uniform(0, _DOWN_S)))

    def _wait(self, place: float, seconds: float) -> None:
        """Until the devices have come so far, or for so long."""
        until = time.monotonic() + seconds
        while self._going and sum(self._reached.values()) < place and time.monotonic() < until:
            self._look()
            time.sleep(_LOOK_S)

    def _look(self) -> None:
        """See how far the devices are, that no daemon has ended that should not, and start those again whose time it is."""
        for name in self._devices:
            for event in self._followers[name].new():
                if event["event"] == "step" and event["step"] > self._reached[name]:
                    self._reached[name], self._learnt = event["step"], time.monotonic()
                elif event["event"] == "end":  # even if it was killed right after that
                    self._done.add(name)
                    self._down.pop(name, None)
        for name in {*self._devices, *self._servers} - self._done - self._down.keys():
            process = self._daemons[name].process
            assert process.poll() is None, f"{name} ended with {process.returncode}:\n{self._logs()}"
        for name in [name for name, when in self._down.items() if when <= time.monotonic()]:
            del self._down[name]
            self._daemons.again(name)
        assert not self._going or time.monotonic() - self._learnt < _STUCK_S, f"no step for {_STUCK_S:g} s:\n{self._logs()}"

    def _logs(self) -> str:
        return "\n".join(f"{name}:\n{self._daemons[name].log[-3000:]}" for name in (*self._servers, *self._devices))
