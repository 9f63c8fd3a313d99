"""Small data files for tests, made on the spot."""

from __future__ import annotations

import random
from pathlib import Path

_WORDS = [
    "proto",
    "tcp",
    "udp",
    "service",
    "http",
    "dns",
    "duration",
    "orig_bytes",
    "resp_bytes",
    "history",
    "SF",
    "S0",
    "fox",
    "dog",
    "quick",
    "lazy",
]


def write_texts(path: Path, count: int, seed: int = 0, labels: tuple[str, ...] = ("Benign", "C&C", "DDoS")) -> Path:
    """`count` different lines `text;label`; the label shows in the text, most of the time."""
    chance = random.Random(seed)
    lines = []
    for number in range(count):
        label = chance.choice(labels)
        hint = _WORDS[labels.index(label)] if chance.random() < 0.9 else "-"
        words = [hint, *chance.choices(_WORDS, k=chance.randint(2, 9)), str(number)]
        lines.append(" ".join(words) + ";" + label)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
