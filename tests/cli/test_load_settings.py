from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from sfl.cli.load_settings import as_toml, load, split_options
from sfl.cli.names import flag_of, nearest, settings_of
from sfl.errors import SettingsError
from sfl.settings import DeviceSettings, EdgeSettings, FedSettings

DEVICE = """
name = "camera"
model = "m"
cut = 2
[data]
path = "flows.log"
[lora]
rank = 4
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "device.toml"
    path.write_text(DEVICE)
    return path


def refusal(
    model: type[BaseModel],
    config: Path | None = None,
    arguments: list[str] | None = None,
    environment: dict[str, str] | None = None,
) -> str:
    with pytest.raises(SettingsError) as caught:
        load(model, config, arguments or [], environment=environment or {})
    return str(caught.value)


def test_flags_override_the_environment_which_overrides_the_file_which_overrides_defaults(config: Path) -> None:
    environment = {"SFL_LORA__RANK": "5", "SFL_CUT": "3", "HOME": "/nowhere"}
    settings = load(DeviceSettings, config, ["--cut", "4"], environment=environment)
    assert (settings.cut, settings.lora.rank, settings.name, settings.lora.alpha) == (4, 5, "camera", 16.0)
    assert settings.data.path == Path("flows.log")


def test_the_environment_of_the_process_counts(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFL_SEED", "7")
    assert load(DeviceSettings, config).seed == 7


@pytest.mark.parametrize("flag", ["--lora.rank", "--lora-rank"])
@pytest.mark.parametrize("form", ["{} 3", "{}=3"])
def test_a_nested_flag_can_be_written_with_a_dot_or_a_dash(config: Path, flag: str, form: str) -> None:
    assert load(DeviceSettings, config, form.format(flag).split(), environment={}).lora.rank == 3


@pytest.mark.parametrize("model", [FedSettings, EdgeSettings, DeviceSettings])
def test_no_two_settings_share_a_flag(model: type[BaseModel]) -> None:
    flags = [flag_of(name).replace(".", "-") for name in settings_of(model)]
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--labels", "Benign, C&C"], {}),
        (["--labels", "Benign", "--labels=C&C"], {}),
        (["--labels", '["Benign", "C&C"]'], {}),
        ([], {"SFL_LABELS": "Benign, C&C"}),
        ([], {"SFL_LABELS": '["Benign", "C&C"]'}),
    ],
)
def test_lists_are_written_with_commas_repeated_or_as_json(arguments: list[str], environment: dict[str, str]) -> None:
    settings = load(FedSettings, None, ["--devices=3", *arguments], environment=environment)
    assert settings.labels == ("Benign", "C&C")


@pytest.mark.parametrize(("arguments", "environment"), [(["--labels", ""], {}), ([], {"SFL_LABELS": ""})])
def test_an_empty_list_can_be_given(tmp_path: Path, arguments: list[str], environment: dict[str, str]) -> None:
    file = tmp_path / "fed.toml"
    file.write_text('devices = 3\nlabels = ["a", "b"]\n')
    assert load(FedSettings, file, arguments, environment=environment).labels == ()


def test_labels_that_look_like_numbers_stay_text() -> None:
    assert load(FedSettings, None, ["--devices=3", "--labels", "0,1"], environment={}).labels == ("0", "1")
    assert load(FedSettings, None, ["--devices=3"], environment={"SFL_LABELS": "0"}).labels == ("0",)


def test_switches_can_be_turned_off_and_on(config: Path) -> None:
    off = load(DeviceSettings, config, ["--no-shuffle", "--no-data.drop-repeats"], environment={})
    assert not off.shuffle and not off.data.drop_repeats
    assert load(DeviceSettings, config, ["--shuffle"], environment={"SFL_SHUFFLE": "false"}).shuffle


def test_a_switch_in_a_table_is_a_switch_all_the_same() -> None:
    arguments = ["--devices=3", "--strategy.keep-progress", "--no-strategy-final-upload"]
    strategy = load(FedSettings, None, arguments, environment={}).strategy
    assert strategy.keep_progress is True and strategy.final_upload is False


def test_none_takes_back_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "device.toml"
    file.write_text(DEVICE.replace("[lora]", 'max_examples = 9\nlabel_column = "kind"\n[lora]'))
    settings = load(DeviceSettings, file, ["--data.max-examples", "None"], environment={"SFL_DATA__LABEL_COLUMN": "None"})
    assert settings.data.max_examples is None and settings.data.label_column is None


@pytest.mark.parametrize(
    ("written", "meant"),
    [("[lora]\nrnak = 3", "lora.rank"), ("lora.rnak = 3", "lora.rank"), ("learning_rate = 1", "optimizer.learning_rate")],
)
def test_an_unknown_key_in_the_file_names_the_nearest(tmp_path: Path, written: str, meant: str) -> None:
    file = tmp_path / "device.toml"
    file.write_text(written)
    message = refusal(DeviceSettings, file)
    assert "unknown setting" in message and "in device.toml" in message and f"did you mean {meant}?" in message


def test_an_unknown_variable_names_the_nearest() -> None:
    message = refusal(DeviceSettings, environment={"SFL_LORA__RNAK": "3"})
    assert message == "unknown setting SFL_LORA__RNAK in the environment: did you mean SFL_LORA__RANK?"


@pytest.mark.parametrize(
    ("flag", "meant"),
    [("--lora.rnak", "--lora.rank"), ("--lora-rnak=3", "--lora.rank"), ("--step", "--steps"), ("--dropout", "--lora.dropout")],
)
def test_an_unknown_flag_names_the_nearest(config: Path, flag: str, meant: str) -> None:
    message = refusal(DeviceSettings, config, [flag, "3"])
    assert message == f"unknown setting {flag.partition('=')[0]}: did you mean {meant}?"


def test_a_name_like_nothing_known_gets_no_guess() -> None:
    assert nearest("zzz", settings_of(FedSettings)) is None
    assert "--help" in refusal(FedSettings, None, ["--zzz", "3"])


def test_a_wrong_value_names_the_setting_its_origin_the_value_and_what_is_allowed(config: Path) -> None:
    config.write_text(DEVICE.replace("rank = 4", "rank = 0"))
    message = refusal(DeviceSettings, config, ["--optimizer.name", "adam"], {"SFL_STEPS": "many"})
    assert "lora.rank = 0 in device.toml: should be greater than or equal to 1" in message
    assert "steps = 'many' from SFL_STEPS: should be a valid integer" in message
    assert "optimizer.name = 'adam' from --optimizer.name: should be 'adamw' or 'sgd'" in message


def test_a_wrong_item_of_a_list_names_the_list(tmp_path: Path) -> None:
    file = tmp_path / "fed.toml"
    file.write_text('devices = 3\nlabels = ["a", 1]\n')
    assert refusal(FedSettings, file).startswith("labels = ['a', 1] in fed.toml:")
    assert refusal(FedSettings, None, ["--devices=3", "--labels", "[b"]).startswith("labels = '[b' from --labels:")
    assert refusal(FedSettings, None, ["--devices=3"], {"SFL_LABELS": "[broken"}).startswith(
        "labels = '[broken' from SFL_LABELS:"
    )


def test_values_that_contradict_each_other_are_refused(config: Path) -> None:
    assert "part_index 3 must be less than part_count 2" in refusal(
        DeviceSettings, config, ["--data.part-index=3", "--data.part-count=2"]
    )


def test_what_is_missing_is_named_in_all_three_spellings() -> None:
    message = refusal(DeviceSettings, None, ["--name", "d", "--model", "m"])
    assert message.startswith("data.path is not set") and "SFL_DATA__PATH" in message and "--data.path" in message


def test_a_table_cannot_be_a_plain_value(tmp_path: Path) -> None:
    file = tmp_path / "device.toml"
    file.write_text("lora = 3")
    assert "'lora' in device.toml must be a table" in refusal(DeviceSettings, file)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert "there is no configuration file" in refusal(FedSettings, tmp_path / "fed.toml")
    assert "cannot be read" in refusal(FedSettings, tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("devices = = 3")
    assert "is not valid TOML" in refusal(FedSettings, broken) and "line 1" in refusal(FedSettings, broken)
    broken.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal(FedSettings, broken)


def test_a_flag_without_its_value_and_a_stray_word_are_refused() -> None:
    assert "--devices" in refusal(FedSettings, None, ["--devices"])
    assert "stray" in refusal(FedSettings, None, ["--devices=3", "stray"])


@pytest.mark.parametrize("name", ["gsfs", "gsfs-printed", "fedavg"])
def test_what_is_printed_holds_the_strategys_own_defaults(name: str, tmp_path: Path) -> None:
    settings = load(FedSettings, None, ["--devices=3", "--strategy.name", name], environment={})
    printed = as_toml(settings)
    for field, value in settings.strategy:
        assert (value is None) == (field == "max_steps" and name != "gsfs-printed"), "that follows min_steps"
        assert (f"\n{field} = " in printed) == (value is not None)
    file = tmp_path / "fed.toml"
    file.write_text(printed)
    assert load(FedSettings, file, environment={}) == settings


def test_help_shows_each_strategys_own_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(FedSettings, None, ["--help"], environment={})
    shown = " ".join(capsys.readouterr().out.split())
    assert "uploads of a device (gsfs); by default 1 with gsfs-printed (default: 8)" in shown
    assert "left out: twice min_steps; 0: no bound (gsfs); by default 0 with gsfs-printed" in shown
    assert "by default frequency with gsfs-printed; examples with fedavg, fedprox," in shown
    assert "a new version is adopted; by default no with gsfs-printed, fedavg, fedprox," in shown


def test_what_is_printed_can_be_read_again(config: Path, tmp_path: Path) -> None:
    arguments = [
        "--no-shuffle",
        "--data.columns",
        "proto,service",
        "--lora.target-modules",
        "q,v",
        "--data.label-column",
        'a "b" ü',
    ]
    settings = load(DeviceSettings, config, arguments, environment={"SFL_OPTIMIZER__LEARNING_RATE": "3e-5"})
    again = tmp_path / "again.toml"
    again.write_text(as_toml(settings), encoding="utf-8")
    assert load(DeviceSettings, again, environment={}) == settings


def test_what_a_device_leaves_to_its_edge_is_not_printed() -> None:
    given = ["--name", "camera", "--data.path", "flows.log"]
    printed = as_toml(load(DeviceSettings, None, given, environment={}))
    assert "task" not in printed and "\nrank" not in printed
    printed = as_toml(load(DeviceSettings, None, [*given, "--lora.rank", "4"], environment={}))
    assert "rank = 4" in printed and "\nalpha" not in printed
    printed = as_toml(load(DeviceSettings, None, [*given, "--model", "m"], environment={}))
    assert "\ntask" in printed and "\nalpha" in printed


def test_help_shows_that_a_cut_is_a_number_or_auto(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(DeviceSettings, None, ["--help"], environment={})
    shown = capsys.readouterr().out
    assert "--cut {N,auto}" in shown and "--compute {fp32,bf16}" in shown


def test_options_are_told_from_settings() -> None:
    options = split_options(["--cut", "2", "--config", "a.toml", "--print-config", "--seed=1"])
    assert options == (Path("a.toml"), True, ["--cut", "2", "--seed=1"])
    with pytest.raises(SettingsError, match="--config needs a file"):
        split_options(["--config"])
