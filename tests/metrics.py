"""What a run wrote, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def events(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The events in `folder`/metrics.jsonl, all or those of one kind."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [event for event in found if kind is None or event["event"] == kind]


def losses_of(folder: Path) -> list[float]:
    """The training losses, step by step."""
    return [event["loss"] for event in events(folder, "step")]
