"""Generated logs are Zeek's format, repeatable, of the classes asked for, and learnable but not trivial."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sfl.data.generate import PROFILES, generate_log
from sfl.data.prompt import flow_class
from sfl.data.read import read_examples
from sfl.data.settings import BEHAVIOUR_COLUMNS, DataSettings
from sfl.data.split import drop_repeats
from sfl.data.traffic import KINDS
from sfl.data.zeek import read_zeek
from sfl.errors import DataError

EQUAL = dict.fromkeys(("Benign", "PartOfAHorizontalPortScan", "C&C", "DDoS", "FileDownload"), 1.0)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("logs") / "new" / "conn.log.labeled"
    generate_log(path, 1500, EQUAL, seed=1)
    return path


def test_equal_arguments_give_equal_bytes(log, tmp_path):
    generate_log(tmp_path / "same", 1500, EQUAL, seed=1)
    generate_log(tmp_path / "other", 1500, EQUAL, seed=2)
    assert (tmp_path / "same").read_bytes() == log.read_bytes() != (tmp_path / "other").read_bytes()


def test_all_zeek_columns_and_a_day_of_flows(log):
    rows = [row for _, row in read_zeek(log, log.read_text())]
    assert len(rows) == 1500 and len(rows[0]) == 23
    times = [float(row["ts"]) for row in rows]
    assert times == sorted(times) and times[-1] - times[0] < 86_400
    assert len({row["uid"] for row in rows}) == 1500


def test_numbers_are_consistent(log):
    for _, row in read_zeek(log, log.read_text()):
        sent, received, out, back = (int(row[name] or 0) for name in ("orig_bytes", "resp_bytes", "orig_pkts", "resp_pkts"))
        assert int(row["orig_ip_bytes"]) >= sent + 28 * out and int(row["resp_ip_bytes"]) >= received + 28 * back
        assert (row["duration"] is None) == (row["orig_bytes"] is None) == (row["resp_bytes"] is None)
        assert row["duration"] is None or 0 < float(row["duration"]) < 86_400


def test_every_class_comes_as_often_as_asked(log, tmp_path):
    counts = Counter(flow_class(row) for _, row in read_zeek(log, log.read_text()))
    assert counts.keys() == EQUAL.keys() and all(230 < count < 370 for count in counts.values())
    generate_log(tmp_path / "one", 50, {"scan": 1, "DDoS": 0}, seed=1)
    assert {flow_class(row) for _, row in read_zeek(tmp_path / "one", (tmp_path / "one").read_text())} == {KINDS["scan"].label}


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_differ_and_repeat_little(profile, tmp_path):
    generate_log(tmp_path / "log", 1000, PROFILES[profile], seed=5)
    examples = read_examples(tmp_path / "log", DataSettings(path="log"))
    assert len(drop_repeats(examples)) > 900
    most, _ = Counter(example.label for example in examples).most_common(1)[0]
    assert most == {"camera": "DDoS", "hub": "Benign", "lock": "Benign"}[profile]
    assert 2 <= len({example.label for example in examples}) <= 5


def test_a_nearest_neighbour_finds_most_classes_but_not_all(log):
    """What one neighbour in log-scaled behaviour gets right: far above chance, below certainty."""
    rows = [row for _, row in read_zeek(log, log.read_text())]
    words: dict[str | None, int] = {}

    def number(name: str, value: str | None) -> float:
        if name in ("proto", "service", "conn_state", "history"):
            return 3.0 * words.setdefault(value, len(words))
        return -1.0 if value is None else float(np.log1p(float(value)))

    features = np.array([[number(name, row[name]) for name in BEHAVIOUR_COLUMNS] for row in rows])
    classes = np.array([flow_class(row) for row in rows])
    train, test = slice(0, None, 2), slice(1, None, 2)
    nearest = np.square(features[test, None] - features[None, train]).sum(axis=2).argmin(axis=1)
    assert 0.75 < (classes[train][nearest] == classes[test]).mean() < 0.96


@pytest.mark.parametrize(
    ("flows", "mix", "message"),
    [
        (0, EQUAL, "0 flows cannot be generated"),
        (5, {"dn": 1.0}, "no traffic called dn: choose among ntp, dns"),
        (5, {"dns": -1.0}, "weight of dns is -1.0"),
        (5, {"dns": 0.0}, "no traffic with a weight above 0"),
    ],
)
def test_wrong_mixes_are_refused(tmp_path, flows, mix, message):
    with pytest.raises(DataError, match=message):
        generate_log(tmp_path / "log", flows, mix, seed=0)
