"""docs/guides: settings that the daemons take, commands and options that there are, and links that lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from sfl.base_settings import Settings
from sfl.cli.asking import AskingSettings
from sfl.cli.health import HealthSettings
from sfl.cli.main import app
from sfl.cli.names import settings_of
from sfl.cli.status import StatusSettings
from sfl.settings import DeviceSettings, EdgeSettings, FedSettings

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
DAEMONS: dict[str, type[Settings]] = {"fed": FedSettings, "edge": EdgeSettings, "device": DeviceSettings}
ASKING: dict[str, type[AskingSettings]] = {"status": StatusSettings, "health": HealthSettings}
OF_ALL = {"--config", "--json", "--watch"}

each_guide = pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)


def commands(guide: Path) -> list[list[str]]:
    """All calls of `sfl` in the guide's shell blocks, without `sfl`."""
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", guide.read_text(encoding="utf-8"), re.M | re.S)).replace("\\\n", " ")
    lines = [re.sub(r"\$\(.*?\)| #.*", "", line) for line in blocks.splitlines() if not line.startswith(("#", "docker", "pip"))]
    found = [re.search(r"(?:^|/bin/)sfl (\w.*)", line) for line in lines]
    return [shlex.split(each[1]) for each in found if each is not None]


@each_guide
def test_settings_are_taken(guide: Path) -> None:
    shown = re.findall(r"^`(?:\S*/)?(\w+)\.toml`.*?\n```toml\n(.*?)^```", guide.read_text(encoding="utf-8"), re.M | re.S)
    assert shown
    for daemon, text in shown:
        DAEMONS[daemon].model_validate(tomllib.loads(text))


@each_guide
def test_commands_and_their_options_exist(guide: Path) -> None:
    group, found = typer.main.get_command(app), commands(guide)
    assert found
    for name, *arguments in found:
        command = group.commands[name]  # type: ignore[attr-defined]  # it is a group
        if hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        if name in DAEMONS or name in ASKING:
            known = {f"--{setting}" for setting in settings_of({**DAEMONS, **ASKING}[name])} | OF_ALL
        elif name == "doctor":
            known = OF_ALL
        assert {argument for argument in arguments if argument.startswith("--")} <= known, (name, arguments)


@each_guide
def test_links_lead_somewhere(guide: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#([\w-]+))?\)", guide.read_text(encoding="utf-8"))
    assert links
    for path, anchor in links:
        text = (guide.parent / path).read_text(encoding="utf-8")
        headings = [
            re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in text.splitlines()
            if line.startswith("#")
        ]
        assert not anchor or anchor in headings, f"{path} has no heading {anchor}"
