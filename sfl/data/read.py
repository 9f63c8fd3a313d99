"""The one entry point for reading: a file of any supported format to examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sfl.data.delimited import header_of, read_delimited
from sfl.data.example import Example, content_key
from sfl.data.prompt import flow_class, normal_class, prompt_maker
from sfl.data.settings import BEHAVIOUR_COLUMNS, DEFAULT_TEXT_COLUMNS, DataSettings, Format, Task
from sfl.data.source import SEPARATORS, NumberedRow, Row, at_line, found_separator, numbered_lines, read_text
from sfl.data.text import read_jsonl, read_plain, read_semicolon
from sfl.data.zeek import read_zeek
from sfl.errors import DataError, DataFileError, DataFormatError, LabelError
from sfl.telemetry import log

_READERS: dict[Format, Callable[[Path, str], Iterator[NumberedRow]]] = {
    "zeek": read_zeek,
    "delimited": read_delimited,
    "semicolon": read_semicolon,
    "jsonl": read_jsonl,
    "text": read_plain,
}
_SAMPLE = 50  # lines looked at to tell a format


class Read(NamedTuple):
    """What a file holds. `columns` is what the texts were made of: a flow's columns, or the text columns unless just `text`."""

    examples: list[Example]
    columns: tuple[str, ...]


def read_examples(path: Path, settings: DataSettings, task: Task = "classification") -> list[Example]:
    """The examples of `read_file`."""
    return read_file(path, settings, task).examples


def read_file(path: Path, settings: DataSettings, task: Task = "classification") -> Read:
    """Read `path` by `settings` (whose own path is not used) into examples, in file order.

    Classification keeps the labelled examples and says how many others there were. For a causal LM a flow's text is its prompt,
    followed by ` class NAME` where it has one, so that the model learns to name the class; other texts stand alone.
    Raises `DataError`, naming the file, the line and what to do, for whatever cannot be read.
    """
    text = read_text(path)
    form = settings.format if settings.format != "auto" else detect_format(path, text, settings)
    rows = list(_READERS[form](path, text))
    if not rows:
        raise DataFileError(f"{path} holds a header but no rows: there is nothing to learn from")
    names = list(rows[0][1])
    is_flow = form in ("zeek", "delimited") and _is_flow(names) and not _has_texts(names, settings.text_columns)
    if is_flow and form == "delimited":
        rows = [(number, _with_unset(row)) for number, row in rows]
    if is_flow:
        examples, columns = _flows(path, rows, settings, task), settings.columns
    else:
        examples, columns = _texts(path, rows, settings, task), settings.text_columns
    if task == "classification":
        examples = _labelled(path, examples, form, names, settings)
    return Read(examples, () if columns == DEFAULT_TEXT_COLUMNS else columns)


def with_columns(settings: DataSettings, columns: tuple[str, ...]) -> DataSettings:
    """`settings` that make texts as those were made that `Read.columns` tells of."""
    if not columns:
        return settings
    of_flows = any(column in BEHAVIOUR_COLUMNS or column.startswith("id.") for column in columns)
    return settings.model_copy(update={"columns" if of_flows else "text_columns": columns})


def detect_format(path: Path, text: str, settings: DataSettings) -> Format:
    """Tell the format from the first lines, and from the name's ending where they leave it open."""
    sample = [line for _, line in zip(range(_SAMPLE), (line for _, line in numbered_lines(text)), strict=False)]
    first = sample[0]
    if any(line.startswith(("#separator", "#fields")) for line in sample):
        return "zeek"
    if path.suffix.lower() in (".jsonl", ".ndjson") or _is_json_object(first):
        return "jsonl"
    names = header_of(first)[1]
    if path.suffix.lower() in (".csv", ".tsv") or _is_flow(names) or _has_texts(names, settings.text_columns):
        return "delimited"
    if all(_ends_in_label(line) for line in sample):
        return "semicolon"
    if len([name for name in BEHAVIOUR_COLUMNS if name in first]) >= 3:
        return "delimited"  # a flow table with the wrong separator: its reader says so
    return "text"


def _flows(path: Path, rows: Sequence[NumberedRow], settings: DataSettings, task: Task) -> list[Example]:
    names = list(rows[0][1])
    try:
        prompt = prompt_maker(settings.columns, names)
    except DataError as error:
        raise type(error)(f"{path}: {error}") from None
    label_of = flow_class if settings.label_column is None else _column_label(path, names, settings.label_column)
    examples = []
    for _, row in rows:
        content = prompt(row)
        label = label_of(row)
        text = f"{content} class {label}" if task == "causal-lm" and label else content
        examples.append(Example(text, label, _time(row.get("ts")), content_key(content)))
    return examples


def _texts(path: Path, rows: Sequence[NumberedRow], settings: DataSettings, task: Task) -> list[Example]:
    names = list(rows[0][1])
    for column in settings.text_columns:
        if column not in names:
            raise DataFormatError(
                f"{path} has no column {column}, only {_listed(names)}: name those of the text in text_columns (of `sfl demo` and"
                " `sfl eval`: --text-column)"
            )
    label_column = settings.label_column or "label"
    if settings.label_column is not None and task == "classification":
        _column_label(path, names, settings.label_column)
    examples = []
    for number, row in rows:
        parts = [(row.get(column) or "").strip() for column in settings.text_columns]
        if not all(parts):
            raise at_line(path, number, f"no {settings.text_columns[parts.index('')]}: give it a text or delete the line")
        content = " || ".join(parts)
        label = (row.get(label_column) or "").strip() or None
        examples.append(Example(content, label, None, content_key(content)))
    return examples


def _labelled(path: Path, examples: list[Example], form: Format, names: list[str], settings: DataSettings) -> list[Example]:
    """The examples that have a label; an error if none has."""
    labelled = [example for example in examples if example.label is not None]
    if not labelled:
        column = settings.label_column or "label"
        if form == "text":
            raise LabelError(
                f"{path} was read as plain text, which has no labels: classification needs text;label lines, a table whose "
                f"first line names a text and a label column, JSON lines or a Zeek log{_separator_hint(path)}"
            )
        if column not in names and not (settings.label_column is None and "detailed-label" in names):
            raise LabelError(
                f"{path} has no label column, only {_listed(names)}: name it in label_column, or choose the causal-lm task"
            )
        raise LabelError(f"{path} has {len(examples)} rows, none of them labelled: classification needs labels")
    if len(labelled) < len(examples):
        log.warning("%s: %d of %d rows have no label and are left out", path, len(examples) - len(labelled), len(examples))
    return labelled


def _column_label(path: Path, names: Iterable[str], column: str) -> Callable[[Row], str | None]:
    if column not in names:
        raise LabelError(f"{path} has no column {column} for the label, only {_listed(names)}")

    def label(row: Row) -> str | None:
        value = (row[column] or "").strip()
        return None if value in ("", "-") else normal_class(value)

    return label


def _separator_hint(path: Path) -> str:
    _, first = next(numbered_lines(read_text(path)))
    other = found_separator(first, but=" ")
    return f" (the first line has {SEPARATORS[other]})" if other else ""


def _is_flow(names: Sequence[str]) -> bool:
    return len(set(names) & set(BEHAVIOUR_COLUMNS)) >= 3


def _with_unset(row: Row) -> Row:
    """A table's flow as `read_zeek` would give it, so that the same flow has the same prompt and key in either format."""
    return {name: None if value in ("", "-") else "" if value == "(empty)" else value for name, value in row.items()}


def _has_texts(names: Sequence[str], text_columns: Sequence[str]) -> bool:
    return set(text_columns) <= set(names)


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), Mapping)
    except json.JSONDecodeError:
        return False


def _ends_in_label(line: str) -> bool:
    """Whether the line ends in `;` and something as short as a label."""
    content, semicolon, label = line.rpartition(";")
    return bool(semicolon and content.strip() and label.strip()) and len(label) <= 40 and len(label.split()) <= 3


def _time(ts: str | None) -> float | None:
    try:
        return float(ts) if ts else None
    except ValueError:
        return None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
