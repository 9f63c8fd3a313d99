"""Zeek logs: the header is honoured, what is damaged is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfl.data.read import read_examples
from sfl.data.settings import DataSettings
from sfl.data.zeek import read_zeek
from sfl.errors import DataError

LOG = """#separator \\x09
#set_separator\t,
#empty_field\t(empty)
#unset_field\t-
#path\tconn
#open\t2019-03-15-14-50-49
#fields\tts\tuid\tproto\tservice\tduration\torig_bytes\ttunnel_parents   label   detailed-label
#types\ttime\tstring\tenum\tstring\tinterval\tcount\tset[string]   string   string
1545403816.962094\tC1\ttcp\t-\t3.139211\t0\t-   benign   -
1545403817.5\tC2\ttcp\thttp\t-\t-\t(empty)   Malicious   C&C
1545403818.5\tC3\tudp\tdns\t0.5\t12\tA,B   Malicious   -
#close\t2019-03-15-14-50-54   benign   -
"""
COLUMNS = ("proto", "service", "duration", "orig_bytes")


def write(tmp_path: Path, text: str, name: str = "conn.log.labeled") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def read(path: Path, **settings: object):
    return read_examples(path, DataSettings(path=path, columns=COLUMNS, **settings))


def test_rows_hold_unset_empty_and_joined_values():
    rows = list(read_zeek(Path("log"), LOG))
    assert [number for number, _ in rows] == [9, 10, 11]
    first, second, third = (row for _, row in rows)
    assert first == {
        "ts": "1545403816.962094", "uid": "C1", "proto": "tcp", "service": None, "duration": "3.139211", "orig_bytes": "0",
        "tunnel_parents": None, "label": "benign", "detailed-label": None,
    }  # fmt: skip
    assert (second["tunnel_parents"], second["label"], second["detailed-label"]) == ("", "Malicious", "C&C")
    assert third["tunnel_parents"] == "A,B"


def test_classes_prompts_and_times(tmp_path):
    examples = read(write(tmp_path, LOG))
    assert [example.label for example in examples] == ["Benign", "C&C", "Malicious"]
    assert examples[0].text == "tcp duration 3.139211 sent 0"
    assert examples[1].text == "tcp http"
    assert examples[0].time == 1545403816.962094


def test_line_ends_make_no_difference(tmp_path):
    assert read(write(tmp_path, LOG)) == read(write(tmp_path, LOG.replace("\n", "\r\n")))


def test_other_separators_and_markers(tmp_path):
    header, rows = LOG.split("#types")[0], LOG.split("#types")[1]
    other = header + "#types" + rows
    other = other.replace("A,B", "A;B").replace("\t", "|").replace("\\x09", "\\x7c").replace("set_separator|,", "set_separator|;")
    other = other.replace("unset_field|-", "unset_field|?").replace("|-|", "|?|").replace("|-|", "|?|").replace("|-   ", "|?   ")
    assert list(read_zeek(Path("log"), other)) == [
        (number, {name: "-" if name == "detailed-label" and value is None else value for name, value in row.items()})
        for number, row in read_zeek(Path("log"), LOG)
    ]
    assert read(write(tmp_path, other)) == read(write(tmp_path, LOG, "usual.log"))


def test_labels_as_columns_of_their_own(tmp_path):
    apart = LOG.replace("   label   detailed-label", "\tlabel\tdetailed-label").replace(
        "]   string   string", "]\tstring\tstring"
    )
    apart = apart.replace("   benign   ", "\tbenign\t").replace("   Malicious   ", "\tMalicious\t")
    assert read(write(tmp_path, apart)) == read(write(tmp_path, LOG, "usual.log"))


def test_logs_joined_end_to_end(tmp_path, caplog):
    assert len(read(write(tmp_path, LOG + LOG))) == 6
    assert not caplog.records


def test_a_log_that_was_not_closed_is_read_with_a_warning(tmp_path, caplog):
    assert len(read(write(tmp_path, LOG.split("#close")[0]))) == 3
    assert "no #close line after its last row" in caplog.text


def test_a_table_gives_the_same_examples(tmp_path):
    names = "ts,uid,proto,service,duration,orig_bytes,tunnel_parents,label,detailed-label"
    rows = [
        "1545403816.962094,C1,tcp,-,3.139211,0,-,benign,-",
        "1545403817.5,C2,tcp,http,,,(empty),Malicious,C&C",
        '1545403818.5,C3,udp,dns,0.5,12,"A,B",Malicious,-',
    ]
    expected = read(write(tmp_path, LOG))
    assert read(write(tmp_path, "\n".join([names, *rows]), "flows.csv")) == expected
    tabs = "\n".join([names, *rows]).replace('"A,B"', "A").replace(",", "\t")
    assert read(write(tmp_path, tabs, "flows.tsv")) == expected
    assert read(write(tmp_path, tabs.replace("\n", "\r\n"), "flows.txt")) == expected


def broken(old: str, new: str) -> str:
    assert old in LOG
    return LOG.replace(old, new)


LAST = "1545403818.5\tC3\tudp\tdns\t0.5\t12\tA,B   Malicious   -\n#close\t2019-03-15-14-50-54   benign   -\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (broken(LAST, "1545403818.5\tC3\tud"), r"line 11: the last row has 3 of 9 fields: the file was cut off"),
        (broken(LAST, "1545403818.5\tC3\tudp\tdns\t0.5\t12\tA,B   Malicious\n#close\n"), r"line 11: the last row has 8 of 9"),
        (broken(LAST, LAST.split("\n")[0]), r"line 11: the last row has no line end, so the log was cut off"),
        (broken("tcp\thttp\t-\t-", "tcp\thttp\t-"), r"line 10: 8 fields where the header names 9"),
        (broken("tcp\thttp", "tcp\tht\ttp"), r"line 10: 10 fields where .* separator inside a value"),
        (LOG.split("1545")[0], r"holds a header but no rows"),
        (broken("#fields\t", "#comment\t"), r"line 8: 9 types for 0 fields"),
        (LOG[LOG.index("1545") :].join(["#separator \\x09\n", ""]), r"line 2: a row before any #fields line"),
        ("#separator \\x09\n#open\t2020\n", r"without a #fields line"),
        (LOG.replace("\t", "    "), r"line 7: #fields is separated by spaces, but the log's separator is tabs"),
        (broken("3.139211", "3.13x"), r"line 9: duration is '3.13x', which is no interval"),
        (broken("\t12\t", "\t1.5\t"), r"line 11: orig_bytes is '1.5', which is no count"),
        (broken("\tuid", "\tts"), r"column ts is named twice"),
        (broken("7.5\tC2\ttcp\thttp\t-\t-\t", "7.5,C2,tcp,http,-,-,"), r"line 10: .*commas, but tabs were expected"),
        (LOG.replace("benign   -", "-   -").replace("Malicious", "-").replace("C&C", "-"), r"3 rows, none of them labelled"),
        (
            LOG.replace("   label   detailed-label", "").replace("   string   string", "").replace("   benign   -", "")
            .replace("   Malicious   C&C", "").replace("   Malicious   -", ""),
            r"has no label column, only ts, uid",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def test_an_unknown_column_names_the_nearest(tmp_path):
    path = write(tmp_path, LOG)
    with pytest.raises(DataError, match=r"no column durations: did you mean duration\?"):
        read_examples(path, DataSettings(path=path, columns=("proto", "durations")))


def test_an_unlabelled_log_serves_a_causal_model(tmp_path):
    path = write(tmp_path, LOG.replace("Malicious   C&C", "-   -"))
    examples = read_examples(path, DataSettings(path=path, columns=COLUMNS), "causal-lm")
    assert [example.text for example in examples] == [
        "tcp duration 3.139211 sent 0 class Benign",
        "tcp http",
        "udp dns duration 0.5 sent 12 class Malicious",
    ]
    assert examples[0].key == read(path)[0].key


def test_rows_without_a_label_are_left_out(tmp_path, caplog):
    examples = read(write(tmp_path, LOG.replace("Malicious   C&C", "-   -")))
    assert len(examples) == 2
    assert "1 of 3 rows have no label" in caplog.text
