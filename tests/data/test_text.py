"""Texts: semicolon lines, JSON lines, tables and plain lines; and files that are none of these."""

from __future__ import annotations

import pytest

from sfl.data.read import detect_format, read_examples
from sfl.data.settings import DataSettings
from sfl.errors import DataError


@pytest.fixture
def read(tmp_path):
    def run(content: str | bytes, name: str = "data.txt", task: str = "classification", **settings: object):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return [(example.text, example.label) for example in read_examples(path, DataSettings(path=path, **settings), task)]

    return run


PAIRS = [("a; b", "joy"), ("c", "fear")]


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("a; b;joy\nc;fear\n", "data.txt"),
        ("a; b;joy\r\n\r\nc;fear", "data.txt"),
        ("text;label\na; b;joy\nc;fear", "data.csv.txt"),
        ("\ufefftext,label\na; b,joy\nc,fear\n", "data.csv"),
        ("label\ttext\njoy\ta; b\nfear\tc\n", "data.tsv"),
        ("text\tlabel\na; b\tjoy\nc\tfear\n", "data.txt"),
        ('id,text,label\n1,"a; b",joy\n2,c,"fear"\n', "data"),
        ('{"text": "a; b", "label": "joy"}\n{"label": "fear", "text": "c", "n": [1]}\n', "data.jsonl"),
        ('{"text": "a; b", "label": "joy"}\n\n{"text": "c", "label": "fear"}', "data"),
    ],
)
def test_formats_are_told_apart(read, content, name):
    assert read(content, name) == PAIRS


def test_plain_text_is_one_example_a_line(read):
    assert read("one\n\n two \n", task="causal-lm") == [("one", None), ("two", None)]


def test_labels_are_not_shown_to_a_causal_model(read):
    assert [text for text, _ in read("a; b;joy\nc;fear\n", task="causal-lm")] == ["a; b", "c"]


def test_several_text_columns(read):
    table = 'mr,ref\n"name[X], area[Y]","X is in Y, they say."\n'
    assert read(table, "e2e.csv", "causal-lm", text_columns=("mr", "ref")) == [("name[X], area[Y] || X is in Y, they say.", None)]


def test_another_label_column_and_numbers_as_labels(read):
    assert read('{"text": "a", "y": 0}\n{"text": "b", "y": 1}', label_column="y") == [("a", "0"), ("b", "1")]


def test_quoted_line_breaks_stay_in_the_text(read):
    assert read('text,label\n"a\nb",joy\nc,fear\n', "x.csv")[0] == ("a\nb", "joy")


def test_the_format_can_be_forced(read):
    assert read("a;joy\nb;fear\n", format="text", task="causal-lm") == [("a;joy", None), ("b;fear", None)]


def test_prose_with_semicolons_is_text(tmp_path):
    lines = "He came; he saw; he conquered everything there was to see.\nint x = 3;\n"
    assert detect_format(tmp_path / "x.txt", lines, DataSettings(path="x")) == "text"


@pytest.mark.parametrize(
    ("content", "name", "settings", "message"),
    [
        (b"", "x.csv", {}, r"is empty"),
        (b" \n\n", "x.csv", {}, r"is empty"),
        ("text,label\n", "x.csv", {}, r"a header but no rows"),
        ("text;label\n", "x.txt", {}, r"a header but no rows"),
        (b"ok;joy\nb\xe9d;fear\n", "x.txt", {}, r"line 2: byte 0xe9 is not UTF-8"),
        (b"ok;joy\nb\0d;fear\n", "x.txt", {}, r"line 2: a NUL byte"),
        ("a;joy\n".encode("utf-16"), "x.txt", {}, r"UTF-16"),
        (b"\x1f\x8b\x08...", "x.gz", {}, r"gzip"),
        ("just prose\nof two lines\n", "x.txt", {}, r"plain text, which has no labels"),
        ("good|joy\nbad|fear\n", "x.txt", {}, r"the first line has vertical bars"),
        ("good,joy\nbad,fear\n", "x.txt", {"format": "semicolon"}, r"line 1: no ';' .*commas are there"),
        ("a;joy\nb\n", "x.txt", {"format": "semicolon"}, r"line 2: no ';'"),
        (";joy\n", "x.txt", {"format": "semicolon"}, r"line 1: no text before"),
        ("text;label\na;joy\n", "x.tsv", {"format": "delimited"}, r"header is separated by semicolons; tabs or commas"),
        ("proto service duration history\ntcp - 1 S\n", "x.log", {}, r"header is separated by spaces; tabs or commas"),
        ("text\tlabel\na,joy\n", "x.tsv", {}, r"line 2: .*1 of 2 fields|commas, but tabs were expected"),
        ("text,label\na,joy\nb\n", "x.csv", {}, r"line 3: the last row has 1 of 2 fields: the file was cut off"),
        ('text,label\n"a,joy\n', "x.csv", {}, r"is a quote missing"),
        ("text,text\na,joy\n", "x.csv", {}, r"named twice: the first line must name the columns"),
        ("body,label\na,joy\n", "x.csv", {}, r"has no column text, only body, label: .* text_columns .*--text-column"),
        ("text,y\na,joy\n", "x.csv", {}, r"has no label column, only text, y"),
        ("text,label\na,joy\n", "x.csv", {"label_column": "z"}, r"has no column z for the label"),
        ("text,label\na,\nb,\n", "x.csv", {}, r"2 rows, none of them labelled"),
        ("text,label\n,joy\n", "x.csv", {}, r"line 2: no text"),
        ('{"text": "a", "label": "b"}\n{"text": "a", "la', "x.jsonl", {}, r"line 2: not JSON at column \d+"),
        ('{"text": "a", "label": "b"}\n[1]\n', "x.jsonl", {}, r"line 2: not a JSON object"),
        ('{"text": "a"}\n', "x.jsonl", {}, r"no label column"),
    ],
)
def test_what_is_wrong_is_named(read, content, name, settings, message):
    with pytest.raises(DataError, match=message):
        read(content, name, **settings)


def test_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(DataError, match="there is no such file"):
        read_examples(tmp_path / "none.csv", DataSettings(path="x"))
    with pytest.raises(DataError, match="is a directory"):
        read_examples(tmp_path, DataSettings(path="x"))
