"""Events as Prometheus figures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sfl.fed_server import daemon
from sfl.watching import watch
from sfl.watching.figures import Figures, device_figures, edge_figures, fed_figures
from sfl.wire.frames import Traffic


def samples(figures: Figures) -> dict[str, float]:
    """Every sample as Prometheus reads it: `name{label="value"}` to its value."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(figures.registry).decode()):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_what_every_daemon_shows() -> None:
    found = samples(Figures("device", "pi-1"))
    assert any(name.startswith('sfl_daemon_info{name="pi-1",role="device"') for name in found)
    assert found["process_resident_memory_bytes"] > 1e6
    assert found["process_open_fds"] > 0
    assert found["sfl_peak_memory_bytes"] > 1e6


def test_a_device() -> None:
    figures = Figures("device", "pi-1")
    hear = device_figures(figures, "pi-1")
    hear("start", {"steps": 40, "name": "pi-1", "cut": 2})
    for number, wall_s in ((1, 0.3), (2, 4.0)):
        hear("step", {"step": number, "version": 5, "loss": 0.75, "examples": 8, "wall_s": wall_s})
    hear("adopt", {"version": 6, "dropped_steps": 2})
    hear("submit", {"trigger": "gradient", "upload_s": 0.2, "failures": 1, "bytes_per_s": 1000})
    hear("submit", {"trigger": "final"})
    hear("eval", {"split": "test", "loss": 0.5, "accuracy": 0.9, "count": 10})
    hear("resume", {"step": 2, "version": 5, "submissions": 2, "checkpoint": 3})
    hear("move", {"step": 2, "version": 6, "submissions": 2, "dropped_steps": 3})
    hear("end", {"steps": 2})
    hear("an event of a later version", {})
    found = samples(figures)
    device = 'device="pi-1"'
    expected = {
        f"sfl_device_steps_total{{{device}}}": 2,
        f"sfl_device_planned_steps{{{device}}}": 40,
        f"sfl_device_step{{{device}}}": 2,
        f"sfl_device_examples_total{{{device}}}": 16,
        f"sfl_loss{{{device}}}": 0.75,
        f"sfl_version{{{device}}}": 6,
        f"sfl_step_seconds_count{{{device}}}": 2,
        f"sfl_step_seconds_sum{{{device}}}": 4.3,
        f'sfl_step_seconds_bucket{{{device},le="0.5"}}': 1,
        f"sfl_adoptions_total{{{device}}}": 1,
        f"sfl_dropped_steps_total{{{device}}}": 2,
        f'sfl_submissions_total{{{device},trigger="gradient"}}': 1,
        f'sfl_submissions_total{{{device},trigger="final"}}': 1,
        f"sfl_upload_seconds_count{{{device}}}": 1,
        f"sfl_upload_failures_total{{{device}}}": 1,
        f"sfl_uplink_bytes_per_second{{{device}}}": 1000,
        f'sfl_evaluation{{{device},figure="accuracy",split="test"}}': 0.9,
        f"sfl_resumes_total{{{device}}}": 1,
        f"sfl_moves_total{{{device}}}": 1,
    }
    assert {name: found.get(name) for name in expected} == pytest.approx(expected)


def edge_step(device: str) -> dict[str, Any]:
    return {"device": device, "step": 1, "version": 2, "loss": 1.5, "wall_s": 0.1, "queue_s": 0.7}


def test_an_edge_server_forgets_what_it_showed_of_a_device() -> None:
    figures = Figures("edge", "edge-1")
    hear = edge_figures(figures)
    for device in ("a", "b"):
        hear("session", {"device": device, "state": "open", "step": 0})
        hear("step", edge_step(device))
    hear("submit", {"device": "a", "submission": "a/1", "version": 2})
    hear("adopt", {"device": "b", "version": 4, "step": 1})
    hear("provide", {"device": "a", "file": "model.safetensors", "bytes": 512})
    found = samples(figures)
    assert found['sfl_edge_steps_total{device="a"}'] == 1
    assert found["sfl_edge_compute_seconds_count"] == 2
    assert found["sfl_edge_queue_seconds_sum"] == pytest.approx(1.4)
    assert found['sfl_version{device="b"}'] == 4
    assert found["sfl_provided_bytes_total"] == 512
    hear("session", {"device": "a", "state": "forgotten", "step": 1})
    hear("session", {"device": "never seen", "state": "forgotten", "step": 0})
    after = samples(figures)
    assert not [name for name in after if 'device="a"' in name]
    assert after['sfl_edge_steps_total{device="b"}'] == 1
    assert after["sfl_edge_compute_seconds_count"] == 2, "what is not by device stays"


def test_the_federation_server() -> None:
    figures = Figures("fed", "fed")
    hear = fed_figures(figures)
    for device in ("a", "a", "b"):
        hear("upload", {"device": device, "bytes_per_s": None, "round_trip_s": None, "failures": 0})
    weights = {"devices": {"a": 0.25, "b": 0.75}, "lags": {"a": 0, "b": 3}, "submissions": 3, "wall_s": 0.02}
    hear("aggregate", {"version": 1, **weights, "epsilon": {"a": 1.5}})
    hear("aggregate", {"version": 2, "devices": {"b": 1.0}, "lags": {"b": 0}, "submissions": 1, "wall_s": 0.02})
    for event in ("refused", "refused", "duplicate", "expired", "no_quorum"):
        hear(event, {"device": "some stranger's invention", "submission": None})
    found = samples(figures)
    assert found["sfl_versions_total"] == 2
    assert found["sfl_aggregated_submissions_total"] == 4
    assert found['sfl_uploads_total{device="a"}'] == 2
    assert found['sfl_weight{device="b"}'] == 1.0
    assert 'sfl_weight{device="a"}' not in found, "it has no part in the newest version"
    assert found['sfl_update_lag_versions_bucket{le="0.0"}'] == 2
    assert found['sfl_epsilon{device="a"}'] == 1.5
    assert [found[f"sfl_{name}_total"] for name in ("refused", "duplicates", "expired", "no_quorum")] == [2, 1, 1, 1]
    assert not [name for name in found if "stranger" in name], "labels are names of members only"


def test_what_is_read_when_somebody_asks() -> None:
    figures = Figures("fed", "fed")
    traffic = {"edge": Traffic()}
    figures.bytes(traffic)
    values: dict[tuple[str, ...], float] = {("a",): 1.0}
    version: list[float | None] = [None]
    figures.read("sfl_last_step_age_seconds", "age", lambda: values, ("device",))
    figures.read("sfl_version", "version", lambda: version[0])
    assert "sfl_version" not in samples(figures)
    version[0], values[("b",)] = 7, 2.0
    traffic["edge"].add(sent=100, received=3)
    traffic["federation"] = Traffic()
    found = samples(figures)
    assert found["sfl_version"] == 7
    assert found['sfl_last_step_age_seconds{device="b"}'] == 2.0
    assert found['sfl_bytes_total{direction="sent",peer="edge"}'] == 100
    assert found['sfl_bytes_total{direction="received",peer="federation"}'] == 0


def test_the_documentation_names_every_figure_and_no_other() -> None:
    text = (Path(__file__).parents[2] / "docs" / "watching.md").read_text(encoding="utf-8")
    told = {name.removesuffix("_total") for name in re.findall(r"`(sfl_\w+)`", text)}
    figures = Figures("device", "pi-1"), Figures("edge", "edge-1"), Figures("fed", "fed")
    device_figures(figures[0], "pi-1")
    edge_figures(figures[1])
    fed_figures(figures[2])
    shown = {family.name for each in figures for family in each.registry.collect() if family.name.startswith("sfl_")}
    for path in (Path(watch.__file__), Path(daemon.__file__)):  # those that are read when somebody asks
        shown |= set(re.findall(r'"(sfl_\w+)"', path.read_text(encoding="utf-8")))
    assert told == shown | {"sfl_bytes"}
