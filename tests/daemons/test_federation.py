"""Three devices with different cuts, two edge servers, a bf16 base and GSFS, as real processes: what the run leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

from sfl.adapters import peft_format
from sfl.cli.main import app
from sfl.model.load import load_task_model
from sfl.settings import DeviceSettings, OptimizerSettings, StrategySettings
from tests.daemons.processes import Daemons
from tests.daemons.runs import edge_settings, several_devices, start_all, stop_servers
from tests.tiny import save_tiny_model
from tests.unsplit import train_unsplit

STEPS = 16
CUTS = {"device-1": 1, "device-2": 2, "device-3": 3}
EDGES = {"edge-a": ("device-1", "device-3"), "edge-b": ("device-2",)}
# An upload at every gradient norm above its mean, so that a short run has several versions.
EAGER = StrategySettings(name="gsfs", quorum=0.6, beta=0, min_steps=2, validate_every=6)


@dataclass
class Run:
    """A run that has ended, and what was seen of its processes while they ran."""

    daemons: Daemons
    devices: tuple[DeviceSettings, ...]
    libraries: dict[str, str]  # /proc/PID/maps, empty where there is none
    codes: dict[str, int]

    @property
    def versions(self) -> Path:
        return self.daemons.folder / "adapters"

    @property
    def newest(self) -> Path:
        return self.versions / f"v{len(list(self.versions.iterdir())) - 1}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("federation")
    model = save_tiny_model(folder / "model", "llama")
    learning = OptimizerSettings(learning_rate=1e-2)
    devices = several_devices(
        folder, model, list(CUTS.values()), steps=STEPS, optimizer=learning, validation_batches=2, precision="bf16"
    )
    edges = [edge_settings("edge-a", devices[0]), edge_settings("edge-b", devices[1], lowest_cut=2)]
    with Daemons(folder / "run") as daemons:
        start_all(daemons, EAGER, edges, devices)
        codes = {name: daemons[name].wait() for name in CUTS}
        libraries = {name: loaded_by(daemons[name].process.pid) for name in ("fed", "edge-a")}
        codes |= stop_servers(daemons, list(EDGES))
        yield Run(daemons, devices, libraries, codes)


def loaded_by(pid: int) -> str:
    maps = Path(f"/proc/{pid}/maps")
    return maps.read_text() if maps.is_file() else ""


def test_all_end_well(run: Run) -> None:
    logs = "\n".join(f"{daemon.name}:\n{daemon.log}" for daemon in run.daemons.by_name.values())
    assert run.codes == dict.fromkeys([*CUTS, *EDGES, "fed"], 0), logs
    assert "Traceback" not in logs and "ERROR" not in logs, logs


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs /proc to see which libraries a process has loaded")
def test_the_federation_server_never_loads_torch(run: Run) -> None:
    assert "libtorch" in run.libraries["edge-a"]
    assert run.libraries["fed"] and "libtorch" not in run.libraries["fed"]


def test_versions_are_in_the_format_of_peft(run: Run) -> None:
    names = {path.name for path in run.versions.iterdir()}
    last = run.daemons["fed"].events("end")[-1]["version"]
    assert names == {f"v{number}" for number in range(last + 1)} and last >= 2
    for name in names:
        files = {path.name for path in (run.versions / name).iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= files
        _, layout = peft_format.read(run.versions / name)
        assert layout.labels == ("Benign", "C&C", "DDoS") and layout.num_layers == 4


@pytest.mark.parametrize("name", CUTS)
def test_a_device_reports_its_steps_submissions_adoptions_and_evaluations(run: Run, name: str) -> None:
    device = run.daemons[name]
    steps = device.events("step")
    assert [event["step"] for event in steps] == list(range(1, STEPS + 1))
    for event in steps:
        assert event.keys() >= {"t", "version", "loss", "examples", "wall_s", "bytes_sent", "bytes_received"}
        assert 1 <= event["examples"] <= 4 and event["wall_s"] > 0 and event["loss"] > 0
    adopted = [event["version"] for event in device.events("adopt")]
    begun = {steps[0]["version"]}  # which is the one it was given, or one that came before its first step
    assert adopted == sorted(set(adopted)) and set(adopted) - begun == {event["version"] for event in steps} - begun
    submitted = device.events("submit")
    assert submitted and {event["trigger"] for event in submitted} <= {"gradient", "performance", "overdue", "final"}
    evaluated = device.events("eval")
    assert {event["split"] for event in evaluated} == {"validation", "test"} and evaluated[-1]["split"] == "test"
    assert 0 <= evaluated[-1]["accuracy"] <= 1 and 0 <= evaluated[-1]["f1_macro"] <= 1
    (end,) = device.events("end")
    assert device.events()[-1] == end
    assert (end["steps"], end["submissions"]) == (STEPS, len(submitted))
    assert end["examples"] == sum(event["examples"] for event in steps) and end["peak_rss_mb"] > 0


def test_versions_are_adopted_while_devices_train(run: Run) -> None:
    versions = [{event["version"] for event in run.daemons[name].events("step")} for name in CUTS]
    assert max(map(len, versions)) > 1, versions


@pytest.mark.parametrize("name", EDGES)
def test_every_step_is_computed_by_one_edge_on_the_version_that_the_device_has(run: Run, name: str) -> None:
    computed = run.daemons[name].events("step")
    assert {event["device"] for event in computed} == set(EDGES[name])
    for device in EDGES[name]:
        at_edge = [(event["step"], event["version"], event["loss"]) for event in computed if event["device"] == device]
        on_device = [(event["step"], event["version"], event["loss"]) for event in run.daemons[device].events("step")]
        assert at_edge == on_device


@pytest.mark.parametrize("name", EDGES)
def test_an_edge_reports_what_it_passed_on_and_ends_when_told_to(run: Run, name: str) -> None:
    edge = run.daemons[name]
    for kind in ("submit", "adopt"):
        at_edge = sorted((event["device"], event["version"]) for event in edge.events(kind))
        on_devices = sorted((device, event["version"]) for device in EDGES[name] for event in run.daemons[device].events(kind))
        assert at_edge == on_devices, kind
    (end,) = edge.events("end")
    assert edge.events()[-1] == end and end["steps"] == STEPS * len(EDGES[name])
    assert end["bytes_received"] > 0 and end["bytes_sent"] > 0 and end["peak_rss_mb"] > 0


def test_the_federation_server_reports_every_version_and_ends_when_told_to(run: Run) -> None:
    fed = run.daemons["fed"]
    made = fed.events("aggregate")
    (end,) = fed.events("end")
    assert fed.events()[-1] == end
    assert [event["version"] for event in made] == list(range(1, end["version"] + 1)) and end["aggregations"] == len(made)
    assert all(0 < weight <= 1 for event in made for weight in event["devices"].values())
    assert all(len(event["devices"]) >= 2 for event in made[:1])  # of three devices 60 % are two
    submitted = sum(len(run.daemons[name].events("submit")) for name in CUTS)
    assert end["submissions"] == submitted == sum(event["submissions"] for event in made)
    assert {event["name"] for event in fed.events("join")} == {*CUTS, *EDGES}
    assert not fed.events("expired")


def test_peft_loads_the_newest_version_and_it_has_learnt(run: Run) -> None:
    start, layout = peft_format.read(run.versions / "v0")
    final, _ = peft_format.read(run.newest)
    assert all(not np.array_equal(final[key], start[key]) for key in final if key.part in ("B", "weight"))
    model = PeftModel.from_pretrained(load_task_model(run.devices[0].model, "classification", layout.labels), run.newest).eval()
    loaded = {name: value for name, value in model.state_dict().items() if "lora_B" in name}
    assert len(loaded) == sum(key.part == "B" for key in final)
    assert all(bool(value.abs().max() > 0) for value in loaded.values())
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3, dtype=torch.int64)).logits
    assert logits.shape == (1, 3) and bool(logits.isfinite().all())


def test_the_base_is_in_bf16_and_the_adapter_in_fp32(run: Run) -> None:
    final, layout = peft_format.read(run.newest)
    assert all(value.dtype == np.float32 for value in final.values())
    for device in run.devices:
        first = run.daemons[device.name].events("step")[0]
        (exact,), _ = train_unsplit(device.model_copy(update={"steps": 1}), layout.labels, run.versions / f"v{first['version']}")
        assert exact != first["loss"] == pytest.approx(exact, rel=0.05)


def test_sfl_eval_prints_the_figures(run: Run) -> None:
    device = run.devices[0]
    where = ["--model", device.model, "--adapter", str(run.newest), "--data", str(device.data.path)]
    result = CliRunner().invoke(app, ["eval", *where, "--json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["count"] == sum(each["count"] for each in figures["classes"]) == 120
    assert figures["loss"] > 0 and 0 <= figures["f1_macro"] <= 1 and 0 <= figures["accuracy"] <= 1
