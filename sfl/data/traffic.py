"""What IoT traffic looks like to Zeek, kind by kind, drawn from a seeded generator.

Shapes and sizes follow what public captures of smart-home devices and botnets show. Classes overlap as they do there: a failed
connect, a bot calling a server that is down and a scan's probe are all a few unanswered SYNs; a firmware update resembles a
malicious download, a flood's requests resemble polling. So no classifier can be perfect from behaviour alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

BENIGN, SCAN, C2, DDOS, DOWNLOAD = "Benign", "PartOfAHorizontalPortScan", "C&C", "DDoS", "FileDownload"


@dataclass(frozen=True)
class Flow:
    """One connection as Zeek records it: seconds, payload bytes, packets, bytes with IP headers; None is unset."""

    proto: str
    service: str | None
    resp_p: int
    conn_state: str
    history: str
    duration: float | None
    orig_bytes: int | None
    resp_bytes: int | None
    orig_pkts: int
    orig_ip_bytes: int
    resp_pkts: int
    resp_ip_bytes: int
    missed_bytes: int = 0


@dataclass(frozen=True)
class Kind:
    """A kind of traffic: its class, how a flow of it is drawn, and whether it comes in bursts or all day long."""

    label: str
    draw: Callable[[Random], Flow]
    bursts: bool = False


def _udp(port: int, service: str | None, sent: int, received: int, seconds: float, packets: int = 1) -> Flow:
    """`packets` datagrams of `sent` bytes each, answered by as many of `received` bytes; 0 means no answer."""
    if received:
        sizes = packets * sent, packets * received
        headers = 28 * packets
        return Flow("udp", service, port, "SF", "Dd", seconds, *sizes, packets, sizes[0] + headers, packets, sizes[1] + headers)
    if packets == 1:
        return Flow("udp", service, port, "S0", "D", None, None, None, 1, sent + 28, 0, 0)
    return Flow("udp", service, port, "S0", "D", seconds, packets * sent, 0, packets, packets * (sent + 28), 0, 0)


def _tcp(rng: Random, port: int, service: str | None, sent: int, received: int, seconds: float, lossy: float = 0.05) -> Flow:
    """A connection that carried data both ways and, mostly, was closed in order."""
    state, end = rng.choices([("SF", "fF"), ("SF", "Ff"), ("S3", "f"), ("RSTR", "r"), ("S1", "")], [50, 30, 8, 8, 4])[0]
    retransmits = rng.random() < lossy
    out = 4 + sent // 1400 + received // 2900 + rng.randrange(3)
    back = 3 + received // 1400 + sent // 2900 + rng.randrange(3)
    missed = 1448 * rng.randint(1, 6) if retransmits and received > 20_000 else 0
    history = "ShADad" + ("t" if retransmits else "") + end
    return Flow(
        "tcp",
        service,
        port,
        state,
        history,
        seconds,
        sent,
        received,
        out,
        sent + 52 * out + 8,
        back,
        received + 52 * back + 8,
        missed,
    )


def _unanswered(rng: Random, port: int, gap: float) -> Flow:
    """SYNs without an answer, sent again after about 1, 3 and 7 seconds, or refused at once."""
    if rng.random() < 0.15:
        return Flow("tcp", None, port, "REJ", "Sr", rng.uniform(0.0004, 0.09), 0, 0, 1, 60, 1, 40)
    tries = rng.choices([2, 3, 4], [20, 70, 10])[0]
    seconds = (2 ** (tries - 1) - 1) + abs(rng.gauss(gap, 0.03))
    return Flow("tcp", None, port, "S0", "S", seconds, 0, 0, tries, 60 * tries, 0, 0)


def _latency(rng: Random) -> float:
    return rng.lognormvariate(-3.5, 0.8)


def _ntp(rng: Random) -> Flow:
    return _udp(123, None, 48, 48 if rng.random() < 0.9 else 0, _latency(rng))


def _dns(rng: Random) -> Flow:
    repeats = rng.random() < 0.2
    answer = rng.randint(45, 260) if rng.random() < 0.93 else 0
    return _udp(53, "dns", rng.randint(26, 62), answer, _latency(rng) + 5.0 * repeats, 1 + repeats)


def _dhcp(rng: Random) -> Flow:
    packets = rng.randint(1, 10)
    return _udp(67, "dhcp", 300, rng.choice([0, 300, 308]), 6.1 * packets * rng.uniform(0.9, 1.1), packets)


def _mqtt(rng: Random) -> Flow:
    minutes = rng.lognormvariate(1.5, 1.2)
    messages = 4 + int(minutes * rng.uniform(1.5, 3))
    service, size = rng.choices([("ssl", 69), (None, 42)], [70, 30])[0]
    return _tcp(rng, 8883 if service else 1883, service, 400 + messages * size, 2800 + messages * (size - 30), 60 * minutes)


def _http_poll(rng: Random) -> Flow:
    return _tcp(rng, 80, "http", rng.randint(110, 420), int(rng.lognormvariate(6.5, 0.9)), _latency(rng) + rng.uniform(0.02, 1.2))


def _firmware(rng: Random) -> Flow:
    return _tcp(rng, 80, "http", rng.randint(130, 300), int(rng.lognormvariate(12.2, 0.8)), rng.uniform(0.8, 9.0), 0.3)


def _failed_connect(rng: Random) -> Flow:
    return _unanswered(rng, rng.choice([443, 8883, 80]), 0.10)


def _scan(rng: Random) -> Flow:
    port = rng.choice([23, 2323, 80, 8080, 81, 37215])
    kind = rng.random()
    if kind < 0.35:
        return _unanswered(rng, port, 0.02)
    if kind < 0.6:  # the port is closed
        return Flow("tcp", None, port, "REJ", "Sr", rng.uniform(0.01, 0.35), 0, 0, 1, 40, 1, 40)
    if kind < 0.9:  # open: reset as soon as it answers
        return Flow("tcp", None, port, "RSTO", "ShR", rng.uniform(0.01, 0.35), 0, 0, 2, 80, 1, 44)
    return Flow("tcp", None, port, "S0", "S", None, None, None, 1, 40, 0, 0)


def _heartbeat(rng: Random) -> Flow:
    beats = rng.randint(1, 9)
    sent, received = 60 + beats * rng.randint(8, 20), 120 + beats * rng.randint(10, 60)
    service = rng.choices(["irc", None], [60, 40])[0]
    flow = _tcp(rng, 6667 if service else 4975, service, sent, received, beats * rng.uniform(8, 33), 0.02)
    return flow if rng.random() < 0.3 else replace(flow, conn_state="S3", history="ShAdDaf")


def _beacon(rng: Random) -> Flow:
    return _unanswered(rng, rng.choice([6667, 4975, 443]), 0.12)


def _syn_flood(rng: Random) -> Flow:
    if rng.random() < 0.15:
        return _unanswered(rng, 80, 0.05)
    packets = rng.randint(2, 40)
    return Flow("tcp", None, 80, "S0", "S", packets * rng.uniform(0.0005, 0.02), 0, 0, packets, 40 * packets, 0, 0)


def _udp_flood(rng: Random) -> Flow:
    return _udp(
        rng.choice([53, 123, 80, 443]), None, rng.choice([48, 512, 1024, 1400]), 0, rng.uniform(0.05, 60), rng.randint(2, 4000)
    )


def _http_flood(rng: Random) -> Flow:
    flow = _tcp(rng, 80, "http", rng.randint(90, 300), int(rng.lognormvariate(5.6, 0.6)), _latency(rng) + rng.uniform(0.0, 0.4))
    return flow if rng.random() < 0.5 else replace(flow, conn_state="RSTO", history="ShADadR")


def _download(rng: Random) -> Flow:
    return _tcp(rng, 80, "http", rng.randint(80, 160), int(rng.lognormvariate(11.6, 0.4)), rng.uniform(0.9, 5.0), 0.8)


KINDS = {
    "ntp": Kind(BENIGN, _ntp),
    "dns": Kind(BENIGN, _dns),
    "dhcp": Kind(BENIGN, _dhcp),
    "mqtt": Kind(BENIGN, _mqtt),
    "http-poll": Kind(BENIGN, _http_poll),
    "firmware": Kind(BENIGN, _firmware),
    "failed-connect": Kind(BENIGN, _failed_connect),
    "scan": Kind(SCAN, _scan, bursts=True),
    "heartbeat": Kind(C2, _heartbeat),
    "beacon": Kind(C2, _beacon),
    "syn-flood": Kind(DDOS, _syn_flood, bursts=True),
    "udp-flood": Kind(DDOS, _udp_flood, bursts=True),
    "http-flood": Kind(DDOS, _http_flood, bursts=True),
    "download": Kind(DOWNLOAD, _download),
}
