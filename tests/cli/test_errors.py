"""`sfl errors`: the page of a number, from the source and from an installation without it."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sfl
from sfl.cli import errors as module
from sfl.cli.main import app
from sfl.errors import SettingsError, SflError
from tests.cli.test_main import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGES = ROOT / "docs" / "errors"


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["errors", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("number", ["603", "SFL-603", "sfl-603"])
def test_the_page_of_a_number(number: str) -> None:
    assert shown(number) == (PAGES / "SFL-603.md").read_text(encoding="utf-8")


def test_without_a_number_the_list() -> None:
    assert shown() == (PAGES / "README.md").read_text(encoding="utf-8")


def test_what_is_no_number_is_said() -> None:
    with pytest.raises(SettingsError, match="'many' is no number of an error"):
        module.errors("many")
    with pytest.raises(SettingsError, match="there is no error SFL-999: `sfl errors` lists all"):
        module.errors("999")


def test_an_installation_has_the_pages_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip leaves them: the files of the wheel's data, beside the packages or elsewhere, and a list of them."""
    ((folder, globs),) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"].items()
    pages = [path for glob in globs for path in ROOT.glob(glob)]
    assert {path.name for path in pages} == {path.name for path in PAGES.iterdir()}
    site, info = tmp_path / "lib" / "site", tmp_path / "lib" / "site" / "sfl-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sfl\nVersion: 1\n")
    (info / "RECORD").write_text("".join(f"../../{folder}/{path.name},,\n" for path in pages))
    (tmp_path / folder).mkdir(parents=True)
    for path in pages:
        (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(sfl, "__file__", str(site / "sfl" / "__init__.py"))
    monkeypatch.setattr(metadata, "files", lambda name: metadata.Distribution.at(info).files)
    assert shown("SFL-701") == (PAGES / "SFL-701.md").read_text(encoding="utf-8")
    for path in (tmp_path / folder).iterdir():
        path.unlink()
    with pytest.raises(SflError, match="did not come with this installation"):
        module.errors("701")
