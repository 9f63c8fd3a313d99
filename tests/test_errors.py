"""Each kind of error has a number of its own, and each number a page."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from sfl import errors
from sfl.errors import SflError, error_code

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "errors"
SECTIONS = ["What it means", "Likely causes", "What to do", "Example"]


def _classes() -> dict[str, tuple[set[str], int | None, str]]:
    """Every class below sfl/: its bases' names, the number that its own body gives, and its file."""
    found: dict[str, tuple[set[str], int | None, str]] = {}
    for path in sorted((ROOT / "sfl").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                found[node.name] = bases, _number(node), str(path.relative_to(ROOT))
    return found


def _number(node: ast.ClassDef) -> int | None:
    for line in node.body:
        target = line.targets[0] if isinstance(line, ast.Assign) else line.target if isinstance(line, ast.AnnAssign) else None
        value = line.value if isinstance(line, ast.Assign | ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == "number" and isinstance(value, ast.Constant):
            return int(value.value)
    return None


def kinds() -> dict[str, tuple[int | None, str]]:
    """All errors of sfl by name, wherever they are defined: their number and file."""
    classes = _classes()
    known = {"SflError"}
    while more := {name for name, (bases, _, _) in classes.items() if bases & known} - known:
        known |= more
    return {name: classes[name][1:] for name in sorted(known)}


KINDS = kinds()
NUMBERS = {number: name for name, (number, _) in KINDS.items() if number is not None}


def test_all_errors_of_the_module_were_found() -> None:
    here = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, SflError)}
    assert here <= KINDS.keys()
    assert len(KINDS) > 30


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_has_a_number_of_its_own(name: str) -> None:
    number, file = KINDS[name]
    assert number is not None, f"{name} in {file} has no `number`: give it one, and a page in docs/errors"
    assert 1 <= number <= 999
    assert Counter(number for number, _ in KINDS.values())[number] == 1, f"{name} shares number {number} with another error"


def test_a_kind_has_the_hundreds_of_its_base_or_names_its_own() -> None:
    """Pages are found by the first digit: settings 1, data 2 and so on, as sfl/errors.py says."""
    for base, hundreds in (("DataError", 2), ("ModelError", 3), ("AdapterError", 4), ("WireError", 5), ("UnreachableError", 7)):
        for name, kind in vars(errors).items():
            if isinstance(kind, type) and issubclass(kind, getattr(errors, base)):
                assert kind.number // 100 == hundreds, name


@pytest.mark.parametrize("number", sorted(NUMBERS))
def test_each_number_has_a_page_that_says_what_to_do(number: int) -> None:
    path = PAGES / f"{error_code(number)}.md"
    assert path.is_file(), f"{NUMBERS[number]} has no page {path}"
    text = path.read_text(encoding="utf-8")
    assert re.match(rf"# {error_code(number)}: \S.+\n", text)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    bodies = re.split(r"^## .+$", text, flags=re.MULTILINE)[1:]
    assert all(len(body.split()) >= 8 for body in bodies), "a section is next to empty"
    assert f"error {error_code(number)}: " in bodies[-1]


def test_each_page_has_a_number_and_a_line_in_the_index() -> None:
    pages = {path.stem for path in PAGES.glob("SFL-*.md")}
    assert pages == {error_code(number) for number in NUMBERS}
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(SFL-\d{3})\]\(SFL-\d{3}\.md\) \|", index, re.MULTILINE)
    assert listed == sorted(pages)
    for page in pages:
        title = (PAGES / f"{page}.md").read_text(encoding="utf-8").splitlines()[0].removeprefix(f"# {page}: ")
        assert f"| [{page}]({page}.md) | {title} |" in index
