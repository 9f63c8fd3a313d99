"""The real command in its own process: exit codes, what goes where, and what is imported."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sfl
from sfl import errors

ROOT = Path(__file__).parents[2]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("SFL_")}


def run(*arguments: str, program: str = "-m sfl.cli.main", **variables: str) -> subprocess.CompletedProcess[str]:
    environment = CLEAN | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | variables
    command = [sys.executable, *program.split(" ", 1), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_version_and_help() -> None:
    assert run("--version").stdout == f"sfl {sfl.__version__}\n"
    listing = run("--help")
    assert listing.returncode == 0
    for command in ("demo", "fed", "edge", "device", "eval", "generate"):
        assert command in listing.stdout


@pytest.mark.parametrize("command", ["fed", "edge", "device"])
def test_the_help_of_a_daemon_describes_its_settings(command: str) -> None:
    listing = run(command, "--help")
    assert listing.returncode == 0 and listing.stderr == ""
    assert "--config FILE" in listing.stdout and "--print-config" in listing.stdout
    assert "this daemon's name, its own in the federation" in " ".join(listing.stdout.split())


@pytest.mark.parametrize(
    "arguments", [["fed", "--help"], ["fed", "--devices", "3", "--print-config"], ["--help"], ["generate", "--help"]]
)
def test_what_needs_no_torch_imports_none(arguments: list[str]) -> None:
    program = """-c import sys
from sfl.cli.main import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "peft", "matplotlib"} & set(sys.modules)
    if heavy: sys.exit(f"imported {heavy}")
"""
    result = run(*arguments, program=program)
    assert result.returncode == 0, result.stderr


def test_the_federation_daemon_imports_no_torch() -> None:
    program = (
        "-c import sys, sfl.cli.main, sfl.fed_server.daemon; sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    result = run(program=program)
    assert result.returncode == 0, result.stderr


def test_print_config_gives_a_file_that_gives_the_same(tmp_path: Path) -> None:
    first = run("edge", "--model", "some/model", "--lora.rank", "4", "--print-config", SFL_SEED="9")
    assert first.returncode == 0 and 'model = "some/model"' in first.stdout and "seed = 9" in first.stdout
    file = tmp_path / "edge.toml"
    file.write_text(first.stdout)
    assert run("edge", "--config", str(file), "--print-config").stdout == first.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fed"], "devices is not set"),
        (["fed", "--devices", "0"], "devices = '0' from --devices: should be greater than or equal to 1"),
        (["fed", "--devcies", "3"], "did you mean --devices?"),
        (["edge", "--config", "no-such.toml"], "there is no configuration file no-such.toml"),
        (["device", "--config"], "--config needs a file"),
        (["generate", "--out", "x.log", "--profile", "toaster"], "choose among camera, hub, lock"),
    ],
)
def test_wrong_settings_end_in_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert re.match(r"error SFL-[12]\d\d: ", result.stderr) and message in result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr


def test_an_unknown_variable_is_refused() -> None:
    result = run("fed", "--devices", "3", SFL_DEVCIES="3")
    assert (result.returncode, result.stderr) == (
        2,
        "error SFL-100: unknown setting SFL_DEVCIES in the environment: did you mean SFL_DEVICES?\n",
    )


@pytest.mark.parametrize("arguments", [["no-such-command"], ["generate"], ["generate", "--out", "x", "--flows", "0"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 2 and "Traceback" not in result.stderr


def test_a_choice_that_there_is_not_is_said_in_plain_words() -> None:
    result = run("eval", "--split", "tset", "--adapter", "x", "--data", "y")
    assert result.returncode == 2
    assert re.search(r"Invalid value for '--split': 'tset' is not one of 'all', 'test'", result.stderr)


RAISING = """-c import sys, types
import sfl.errors
from sfl.cli.main import main
daemon = types.ModuleType("sfl.fed_server.daemon")
def run(settings):
    raise {error}
daemon.run = run
sys.modules["sfl.fed_server.daemon"] = daemon
main()
"""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        *(
            (f"sfl.errors.{kind.__name__}('why')", 2, f"error SFL-{kind.number}: why\n")
            for kind in (errors.DataError, errors.ModelError, errors.AdapterError)
        ),
        ("sfl.errors.OwnCertificateError('why')", 2, "error SFL-801: why\n"),
        ("sfl.errors.ListenError('why')", 1, "error SFL-103: why\n"),  # an address may come up after the daemon
        ("sfl.errors.CertificateTimeError('why')", 1, "error SFL-805: why\n"),
        ("sfl.errors.PeerIdentityError('why')", 1, "error SFL-802: why\n"),
        ("__import__('sfl.adapters.peft_format').adapters.peft_format.AdapterWriteError('why')", 1, "error SFL-401: why\n"),
        ("sfl.errors.UnreachableError('why')", 1, "error SFL-700: why\n"),
        ("sfl.errors.RefusedError('why')", 1, "error SFL-600: why\n"),
        ("sfl.errors.NameTakenError('why')", 1, "error SFL-605: why\n"),
        ("sfl.errors.WireError('why')", 1, "error SFL-500: why\n"),
        ("PermissionError(13, 'Permission denied', 'out')", 1, "error SFL-002: [Errno 13] Permission denied: 'out'\n"),
        (
            "ModuleNotFoundError('No module', name='torch.nn')",
            2,
            "error SFL-003: this needs torch, which is not installed: pip install '.[train]' in sfl's folder\n",
        ),
        ("KeyboardInterrupt", 130, None),
    ],
)
def test_each_kind_of_failure_has_its_exit_code_and_no_traceback(error: str, code: int, message: str | None) -> None:
    result = run("fed", "--devices", "3", program=RAISING.replace("{error}", error))
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert message is None or result.stderr == message


def test_a_mistake_in_the_program_keeps_its_traceback() -> None:
    result = run("fed", "--devices", "3", program=RAISING.replace("{error}", "ZeroDivisionError"))
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_where_a_failure_happened_is_logged_on_request() -> None:
    program = RAISING.replace("{error}", "sfl.errors.RefusedError('why')")
    result = run("fed", "--devices", "3", "--log-level", "DEBUG", program=program)
    assert "Traceback" in result.stderr and result.stderr.endswith("error SFL-600: why\n")


def test_in_a_log_of_json_the_last_line_is_json_too() -> None:
    program = RAISING.replace("{error}", "sfl.errors.ModelDiffersError('why')")
    result = run("fed", "--devices", "3", "--name", "server", "--log-format", "json", program=program)
    assert result.returncode == 1
    last = json.loads(result.stderr.splitlines()[-1])
    assert (last["level"], last["daemon"], last["message"]) == ("ERROR", "server", "why")
    assert last["fields"] == {"error": "SFL-602"}


def test_generated_logs_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first, second, other = tmp_path / "a" / "first.log", tmp_path / "second.log", tmp_path / "other.log"
    for path, seed in ((first, "1"), (second, "1"), (other, "2")):
        result = run("generate", "--out", str(path), "--flows", "50", "--profile", "hub", "--seed", seed)
        assert result.returncode == 0, result.stderr
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    assert sum(not line.startswith("#") for line in first.read_text().splitlines()) == 50
