"""Which cut is recommended, and what is said where none fits."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from sfl.errors import ModelError, SettingsError
from sfl.planning.calibration import DEFAULT, Calibration
from sfl.planning.choice import choose_cut, fit, recommend, require_fits
from sfl.planning.memory import DeviceMemory
from sfl.planning.plan import CutPlan, Plan, make_plan
from sfl.planning.report import Report
from sfl.planning.request import PlanRequest
from sfl.planning.speeds import Speeds, StepTime, speeds_of
from sfl.planning.step_bytes import StepBytes
from tests.tiny import tiny_config

CALIBRATION = Calibration({"fp32": 100.0, "bf16": 100.0, "int8": 100.0, "nf4": 200.0}, 150.0)


def entry(cut: int, mb: float, step_s: float | None = None, device_flops: int = 0) -> CutPlan:
    time = None if step_s is None else StepTime(step_s, 0.0, 0.0, step_s)
    return CutPlan(cut, DeviceMemory(mb, 0, 0, 0, 0, 0, "backward"), 0, 0, 1000.0, 10, 10, device_flops * cut, 0, time)


def plan(*cuts: CutPlan) -> Plan:
    return Plan(PlanRequest(), cuts, speeds_of(PlanRequest(), DEFAULT), DEFAULT)


def test_the_margin_is_a_tenth_of_the_peak() -> None:
    assert fit(entry(1, 100), 110.1) == "yes"
    assert fit(entry(1, 100), 109.9) == "barely"
    assert fit(entry(1, 100), 99.9) == "no"
    assert fit(entry(1, 100), None) is None


def test_the_fastest_step_of_the_cuts_that_fit() -> None:
    found = recommend(plan(entry(1, 100, 5.0), entry(2, 200, 3.0), entry(3, 300, 1.0)), 250)
    assert found.cut == 2 and "200 MB leave 50 of 250 MB free" in found.reason


def test_where_a_deeper_cut_costs_next_to_no_time_the_deeper_one() -> None:
    found = recommend(plan(entry(1, 100, 1.0), entry(2, 200, 1.05), entry(3, 300, 1.2)), 1000)
    assert found.cut == 2 and "shows the edge less" in found.reason


def test_without_speeds_the_least_work_for_the_device() -> None:
    found = recommend(plan(entry(1, 100, device_flops=10), entry(2, 200, device_flops=10)), 1000)
    assert found.cut == 1 and "asks less of the device" in found.reason
    assert "assumed: an edge 10 times as fast as the device" in found.reason


def test_what_barely_fits_is_taken_only_where_nothing_fits_well() -> None:
    assert recommend(plan(entry(1, 100, 5.0), entry(2, 200, 1.0)), 205).cut == 1
    found = recommend(plan(entry(1, 100, 5.0), entry(2, 200, 1.0)), 105)
    assert found.cut == 1 and "no cut leaves a margin of 10%" in found.reason
    assert "it is the only cut that fits" in found.reason


def test_the_only_cut_with_a_margin_is_not_called_the_only_one_that_fits() -> None:
    found = recommend(plan(entry(1, 100, 5.0), entry(2, 200, 1.0)), 205)
    assert (found.cut, found.fits) == (1, "yes") and "it is the only cut with a margin of 10%" in found.reason


def test_of_several_precisions_one_that_fits_with_the_margin_goes_before_a_more_exact_one_that_barely_does() -> None:
    def best(*plans: Plan, memory: float | None) -> tuple[object, str]:
        report = Report("model", plans, memory, True)
        said = next(line for line in report.shown() if isinstance(line, str) and line.startswith(("most exact", "nothing")))
        return report.as_dict()["recommended"], said

    exact, coarse = plan(entry(1, 100)), replace(plan(entry(1, 50)), request=PlanRequest(precision="int8"))
    assert best(exact, coarse, memory=105) == (
        {"precision": "int8", "cut": 1},
        "most exact that fits with a margin of 10%: int8 at cut 1",
    )
    assert best(exact, coarse, memory=51) == ({"precision": "int8", "cut": 1}, "most exact that fits: int8 at cut 1")
    assert best(exact, coarse, memory=None) == ({"precision": "fp32", "cut": 1}, "most exact that fits: fp32 at cut 1")
    assert best(exact, coarse, memory=20) == (None, "nothing fits")


def test_none_fits() -> None:
    found = recommend(plan(entry(1, 100), entry(2, 200)), 90)
    assert found.cut is None and found.reason == "no cut fits 90 MB: the least, cut 1, needs 100 MB"


def test_without_a_limit_every_cut_will_do() -> None:
    assert recommend(plan(entry(1, 100, 5.0), entry(2, 200, 1.0)), None).cut == 2


def test_a_step_waits_for_its_own_computing_and_the_link_or_for_the_others_at_the_edge() -> None:
    speeds = Speeds(10.0, 100.0, 8.0, 100.0, ())
    alone = speeds.step(20 * 10**9, 50 * 10**9, StepBytes(10**6, 10**6), 1)
    assert alone == StepTime(2.0, 2.1, 0.5, 4.6)
    many = speeds.step(20 * 10**9, 50 * 10**9, StepBytes(10**6, 10**6), 20)
    assert many is not None and many.step == 10.0


def test_speeds_that_are_given_go_before_measured_ones() -> None:
    calibration = replace(CALIBRATION, gflops={"fp32": 20.0})
    found = speeds_of(PlanRequest(bandwidth_mbit=10), calibration)
    assert (found.device_gflops, found.edge_gflops, found.bandwidth_mbit) == (20.0, 200.0, 10)
    assert found.assumed == ("an edge 10 times as fast as the device", "a round trip of 2 ms")
    given = speeds_of(PlanRequest(device_gflops=1.0, edge_gflops=3.0, bandwidth_mbit=1.0, rtt_ms=0.0), calibration)
    assert given == Speeds(1.0, 3.0, 1.0, 0.0, ())


def test_with_an_edge_that_many_share_a_deeper_cut_is_faster() -> None:
    config = tiny_config("llama", layers=8)
    request = PlanRequest(device_gflops=10.0, edge_gflops=10.0, bandwidth_mbit=1000.0)
    assert recommend(make_plan(config, request, CALIBRATION), 1000).cut == 7  # the same work on either side: a tie
    fast = replace(request, edge_gflops=1000.0)
    assert recommend(make_plan(config, fast, CALIBRATION), 1000).cut == 1
    crowded = replace(fast, devices=400)
    assert (recommend(make_plan(config, crowded, CALIBRATION), 1000).cut or 0) > 1


def test_a_device_chooses_its_cut() -> None:
    assert choose_cut(tiny_config("opt"), PlanRequest(), 1000, CALIBRATION).cut == 1


def test_a_device_that_barely_fits_is_warned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sfl"):
        logging.getLogger("sfl").propagate = True
        assert choose_cut(tiny_config("opt"), PlanRequest(), 115, CALIBRATION).cut == 1
    assert "no cut leaves a margin" in caplog.text


def test_no_cut_fits_says_by_how_much_and_what_would_help() -> None:
    config = tiny_config("opt", hidden=256, ffn_dim=1024)
    with pytest.raises(SettingsError) as caught:
        choose_cut(config, PlanRequest(batch_size=32, max_length=64), 130, CALIBRATION)
    text = str(caught.value)
    assert text.startswith("no cut fits 130 MB: the least, cut 1, needs 1")
    assert "process 100, weights 3" in text
    assert "MB with micro_batch 1 (fits)" in text and "MB with precision int8" in text


def test_a_cut_that_was_asked_for_must_fit() -> None:
    config = tiny_config("opt", hidden=256, ffn_dim=1024)
    request = PlanRequest(batch_size=32, max_length=64)
    enough = require_fits(config, request, 1, 1000, CALIBRATION).device_mb
    with pytest.raises(SettingsError, match=r"cut 3 does not fit .* it needs .*Cuts up to 1 fit\. Cut 3 would take"):
        require_fits(config, request, 3, enough + 1, CALIBRATION)
    with pytest.raises(ModelError, match="cut 4 is not possible"):
        require_fits(config, request, 4, 1000, CALIBRATION)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0: give 1 or more"),
        ({"micro_batch": -1}, "micro_batch is -1"),
        ({"bandwidth_mbit": 0.0}, "bandwidth_mbit is 0.0"),
        ({"edge_gflops": float("nan")}, "edge_gflops is nan"),
    ],
)
def test_numbers_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_plan(tiny_config("opt"), replace(PlanRequest(), **changes), CALIBRATION)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("opt", {"max_length": 500}, "at most 128"),
        ("opt", {"lowest_cut": 4}, "a cut is between 1 and 3"),
        ("bert", {"task": "causal-lm"}, "has no task 'causal-lm'"),
    ],
)
def test_what_the_model_cannot_do(family: str, changes: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_plan(tiny_config(family), replace(PlanRequest(), **changes), CALIBRATION)


def test_a_plan_covers_every_cut_and_its_parts_add_up() -> None:
    config = tiny_config("gemma2", layers=6)
    request = PlanRequest(batch_size=4, max_length=16, precision="int8", edge_precision="bf16", lowest_cut=2, devices=3)
    found = make_plan(config, request, CALIBRATION)
    assert [each.cut for each in found.cuts] == [2, 3, 4, 5]
    for each in found.cuts:
        device = each.device
        parts = device.floor + device.weights + device.adapter + device.activations + device.temporary + device.slack
        assert each.device_mb == pytest.approx(parts) and device.phase in ("forward", "wait", "backward")
    for shallow, deep in zip(found.cuts, found.cuts[1:]):
        assert shallow.device_mb < deep.device_mb and shallow.edge_mb > deep.edge_mb
        assert shallow.device_flops < deep.device_flops and shallow.edge_flops > deep.edge_flops


def test_another_device_costs_the_edge_its_adapter_and_nothing_else() -> None:
    config = tiny_config("opt")
    one, two, three = (make_plan(config, PlanRequest(devices=count), CALIBRATION).cuts[0].edge_mb for count in (1, 2, 3))
    assert 0 < two - one < 0.5 and three - two == pytest.approx(two - one)


def test_sgd_keeps_no_moments() -> None:
    config = tiny_config("opt")
    adamw, sgd = (make_plan(config, PlanRequest(optimizer=name), CALIBRATION).cuts[0].device.adapter for name in ("adamw", "sgd"))
    assert adamw == 2 * sgd
