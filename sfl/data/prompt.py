"""A flow as text: the chosen columns, compact enough for all behaviour columns to fit into 64 WordPiece tokens.

Of the 9,477 distinct flows of seven IoT-23 captures none takes more than 59 tokens (median 35) with an uncased BERT vocabulary;
with Zeek's own column names more than a third take over 64. Lower-casing merges no two flows of a capture. Values are exact, so
two flows have one prompt only if the chosen columns are equal.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence

from sfl.data.source import Row
from sfl.errors import DataFormatError

_WORDS = {
    "proto": "",
    "service": "",
    "duration": "duration",
    "orig_bytes": "sent",
    "resp_bytes": "received",
    "conn_state": "state",
    "missed_bytes": "missed",
    "history": "history",
    "orig_pkts": "packets out",
    "orig_ip_bytes": "bytes out",
    "resp_pkts": "packets in",
    "resp_ip_bytes": "bytes in",
    "id.orig_h": "from",
    "id.orig_p": "from port",
    "id.resp_h": "to",
    "id.resp_p": "port",
    "ts": "time",
}


def prompt_maker(columns: Sequence[str], known: Collection[str]) -> Callable[[Row], str]:
    """A function from a flow with the columns `known` to its prompt: `tcp http duration 1.47 sent 149 ... bytes in 139044`.

    Unset values are left out; a flow of which nothing is left becomes "-". Raises `DataError` for a column that is not known,
    naming the nearest that is.
    """
    for column in columns:
        if column not in known:
            near = difflib.get_close_matches(column, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise DataFormatError(f"the flows have no column {column}: {hint}")
    words = [(column, f"{word} " if (word := _word(column)) else "") for column in columns]

    def prompt(row: Row) -> str:
        return " ".join([word + value for column, word in words if (value := row[column]) is not None]) or "-"

    return prompt


def flow_class(row: Row) -> str | None:
    """The detailed label where it is set, else the label; Benign and Malicious in one letter case. None if neither is set."""
    label = _set(row.get("detailed-label")) or _set(row.get("label"))
    return normal_class(label) if label else None


def normal_class(label: str) -> str:
    """The captures write both `Benign` and `benign`."""
    return label.capitalize() if label.lower() in ("benign", "malicious") else label


def _word(column: str) -> str:
    return _WORDS[column] if column in _WORDS else column.replace("_", " ").replace(".", " ")


def _set(value: str | None) -> str | None:
    return None if value is None or value.strip() in ("", "-", "(empty)") else value.strip()
