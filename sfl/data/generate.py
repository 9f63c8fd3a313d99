"""Synthetic Zeek logs, for demonstrations and tests when no capture is at hand."""

from __future__ import annotations

import string
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from random import Random

from sfl.data.traffic import KINDS, Flow
from sfl.errors import DataError

# Three devices that see different things: one is scanned and flooded through, one calls home to a botnet, one is left alone.
PROFILES: dict[str, dict[str, float]] = {
    "camera": {
        "dns": 7, "ntp": 4, "http-poll": 12, "failed-connect": 5,
        "PartOfAHorizontalPortScan": 25, "DDoS": 40, "beacon": 6, "download": 4,
    },
    "hub": {
        "dns": 12, "ntp": 5, "mqtt": 16, "http-poll": 8, "firmware": 6, "failed-connect": 7,
        "heartbeat": 27, "beacon": 8, "download": 11, "PartOfAHorizontalPortScan": 5,
    },
    "lock": {
        "dns": 24, "ntp": 14, "dhcp": 8, "mqtt": 28, "firmware": 3, "failed-connect": 7,
        "PartOfAHorizontalPortScan": 10, "heartbeat": 5, "DDoS": 4,
    },
}  # fmt: skip

_DAY = 86_400.0
_START = 1_577_836_800.0  # 2020-01-01 00:00 UTC
_BURSTS, _BURST_SECONDS = 6, 1200.0
_COLUMNS = {
    "ts": "time", "uid": "string", "id.orig_h": "addr", "id.orig_p": "port", "id.resp_h": "addr", "id.resp_p": "port",
    "proto": "enum", "service": "string", "duration": "interval", "orig_bytes": "count", "resp_bytes": "count",
    "conn_state": "string", "local_orig": "bool", "local_resp": "bool", "missed_bytes": "count", "history": "string",
    "orig_pkts": "count", "orig_ip_bytes": "count", "resp_pkts": "count", "resp_ip_bytes": "count",
    "tunnel_parents   label   detailed-label": "set[string]   string   string",
}  # fmt: skip


def generate_log(path: Path, flows: int, mix: Mapping[str, float], seed: int) -> None:
    """Write a labelled Zeek log of `flows` flows over one day, in order of time; equal arguments give equal bytes.

    `mix` gives weights to kinds of traffic (names in `KINDS`) or to classes, whose kinds share their weight evenly.
    Raises `DataError` for an unknown name and for weights or a number of flows that are not positive.
    """
    weights = _kind_weights(mix)
    if flows < 1:
        raise DataError(f"{flows} flows cannot be generated: ask for at least 1")
    rng = Random(seed)
    own = f"192.168.1.{10 + seed % 200}"
    bursts = [_START + rng.uniform(0, _DAY - _BURST_SECONDS) for _ in range(_BURSTS)]
    rows = []
    for name in rng.choices(list(weights), list(weights.values()), k=flows):
        kind = KINDS[name]
        time = rng.choice(bursts) + rng.uniform(0, _BURST_SECONDS) if kind.bursts else _START + rng.uniform(0, _DAY)
        rows.append((time, _line(rng, time, own, kind.draw(rng), kind.label)))
    rows.sort()
    header = [
        "#separator \\x09",
        "#set_separator\t,",
        "#empty_field\t(empty)",
        "#unset_field\t-",
        "#path\tconn",
        f"#open\t{_stamp(_START)}",
        "\t".join(["#fields", *_COLUMNS]),
        "\t".join(["#types", *_COLUMNS.values()]),
    ]
    lines = [*header, *(line for _, line in rows), f"#close\t{_stamp(_START + _DAY)}", ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(lines).encode())


def _kind_weights(mix: Mapping[str, float]) -> dict[str, float]:
    weights = dict.fromkeys(KINDS, 0.0)
    for name, weight in mix.items():
        members = [name] if name in KINDS else [kind for kind in KINDS if KINDS[kind].label == name]
        if not members:
            labels = sorted({kind.label for kind in KINDS.values()})
            raise DataError(f"there is no traffic called {name}: choose among {', '.join([*KINDS, *labels])}")
        if not 0 <= weight < float("inf"):
            raise DataError(f"the weight of {name} is {weight}: give a number from 0 up")
        for member in members:
            weights[member] += weight / len(members)
    if not any(weights.values()):
        raise DataError("the mix has no traffic with a weight above 0")
    return weights


def _line(rng: Random, time: float, own: str, flow: Flow, label: str) -> str:
    uid = "C" + "".join(rng.choices(string.ascii_letters + string.digits, k=17))
    peer = "192.168.1.1" if flow.service in ("dns", "dhcp") else f"203.0.113.{rng.randint(1, 254)}"
    values = [
        f"{time:.6f}", uid, own, rng.randint(32768, 60999), peer, flow.resp_p, flow.proto, flow.service,
        None if flow.duration is None else f"{flow.duration:.6f}", flow.orig_bytes, flow.resp_bytes, flow.conn_state, None, None,
        flow.missed_bytes, flow.history, flow.orig_pkts, flow.orig_ip_bytes, flow.resp_pkts, flow.resp_ip_bytes,
    ]  # fmt: skip
    labels = f"-   {'Benign   -' if label == 'Benign' else f'Malicious   {label}'}"
    return "\t".join(["-" if value is None else str(value) for value in values] + [labels])


def _stamp(time: float) -> str:
    return datetime.fromtimestamp(time, timezone.utc).strftime("%Y-%m-%d-%H-%M-%S")
