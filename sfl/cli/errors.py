"""`sfl errors`: the page of an error's number, which comes with sfl however it was installed."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

import sfl
from sfl.errors import SettingsError, SflError, error_code

_INDEX = "README.md"


def errors(number: Annotated[str, typer.Argument(help="as in SFL-603 or 603; none: the list of all")] = "") -> None:
    """Say what an error's number means, what causes it, and what to do."""
    found = re.fullmatch(r"(?:SFL-)?(\d{1,3})", number.strip(), re.IGNORECASE)
    if number and not found:
        raise SettingsError(f"'{number}' is no number of an error: give one as in SFL-603")
    name = f"{error_code(int(found[1]))}.md" if found else _INDEX
    pages = _pages()
    if name not in pages:
        raise SettingsError(f"there is no error {name.removesuffix('.md')}: `sfl errors` lists all")
    typer.echo(pages[name].read_text(encoding="utf-8"), nl=False)


def _pages() -> dict[str, Path]:
    """The pages by file name: in the source's docs/errors, else where pyproject.toml's data-files have put them."""
    source = Path(sfl.__file__).parents[1] / "docs" / "errors"
    if (source / _INDEX).is_file():
        return {path.name: path for path in source.glob("*.md")}
    try:
        files = metadata.files("sfl") or []
    except metadata.PackageNotFoundError:
        files = []
    paths = (Path(str(file.locate())) for file in files if file.parts[-3:-1] == ("sfl", "errors") and file.suffix == ".md")
    found = {path.name: path for path in paths if path.is_file()}  # pip --target moves them, and images may lack documentation
    if not found:
        raise SflError("the pages of errors did not come with this installation: see docs/errors in sfl's source")
    return found
