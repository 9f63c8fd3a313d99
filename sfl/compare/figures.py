"""What a run's devices and servers came to, from their own reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from time import perf_counter

from sfl.cluster.metrics import last, read_events
from sfl.compare.central import Texts
from sfl.compare.job import Job
from sfl.compare.outcome import DeviceOutcome, Outcome, Scores
from sfl.settings import DeviceSettings
from sfl.simulation import Simulated


def with_federation(
    outcome: Outcome,
    job: Job,
    simulated: Simulated,
    accuracies: Mapping[str, float],
    texts: Texts,
    latency_texts: int,
    out: Path,
) -> Outcome:
    """`outcome` with the figures of its devices and servers."""
    epsilons = simulated.federation.epsilons()
    edge_received, edge_sent = simulated.edge_traffic.received, simulated.edge_traffic.sent  # before the texts that are timed
    lost = simulated.lost.keys()
    return dataclasses.replace(
        outcome,
        devices=tuple(
            _device(device, job, accuracies[device.name], epsilons.get(device.name), out, device.name in lost)
            for device in job.devices
        ),
        submissions=simulated.federation.submissions,
        fed_received=simulated.fed_traffic.received,
        fed_sent=simulated.fed_traffic.sent,
        edge_received=edge_received,
        edge_sent=edge_sent,
        split_latency_s=_split_latency(job, simulated, texts, latency_texts),
        epsilon=max(epsilons.values(), default=None),
        refused=simulated.federation.refused,
        lost=len(lost),
    )


def without_federation(outcome: Outcome, job: Job, accuracies: Mapping[str, float]) -> Outcome:
    """`outcome` of centralised training, with the places of the devices, of which only the examples are there."""
    sizes = {name: (len(splits.train), len(splits.test)) for name, splits in job.division.splits.items()}
    places = (DeviceOutcome(name, 0, 0, False, *sizes[name], 0, None, accuracy) for name, accuracy in accuracies.items())
    return dataclasses.replace(outcome, devices=tuple(places))


def _device(
    device: DeviceSettings, job: Job, central_accuracy: float, epsilon: float | None, out: Path, lost: bool
) -> DeviceOutcome:
    path = out / device.name / "metrics.jsonl"
    events = read_events(path)
    tested = None if lost else last(events, "eval", path, split="test")
    splits = job.division.splits[device.name]
    return DeviceOutcome(
        name=device.name,
        cut=int(device.cut),
        rank=device.rank or device.lora.rank,
        attacker=device.name in job.attackers.names,
        train=len(splits.train),
        test=len(splits.test),
        submissions=sum(event["event"] == "submit" for event in events),
        own=None if tested is None else Scores(tested["accuracy"], tested["f1_macro"], tested["loss"]),
        central_accuracy=central_accuracy,
        epsilon=epsilon,
    )


def _split_latency(job: Job, simulated: Simulated, texts: Texts, count: int) -> float:
    """The mean time of classifying one text through device and edge, over texts evenly spaced over each device's test."""
    seconds, start = [], 0
    each = max(1, count // len(job.devices))
    for name, examples in job.division.tests.items():
        trainer = simulated.trainers[name]
        batches = [texts.batch(start + index * len(examples) // each) for index in range(min(each, len(examples)))]
        start += len(examples)
        trainer.evaluate(batches[:1])  # the first one is slower
        for batch in batches:
            began = perf_counter()
            trainer.evaluate([batch])
            seconds.append(perf_counter() - began)
    return mean(seconds)
