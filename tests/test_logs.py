"""The log, as text and as JSON."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone

import pytest

from sfl.errors import ModelDiffersError
from sfl.telemetry import configure_logging, is_structured, log


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_json_lines_hold_what_was_said_and_of_which_kind_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", "json", "edge-1")
    log.debug("not this")
    log.info("%s opened a session at cut %d", "pi-1", 2)
    log.warning('quotes " and\nlines', extra={"fields": {"device": "pi-2", "step": 7}})
    first, second = lines(capsys)
    assert first["message"] == "pi-1 opened a session at cut 2"
    assert first["template"] == "%s opened a session at cut %d"
    assert (first["level"], first["daemon"], first["fields"]) == ("INFO", "edge-1", {})
    told = datetime.fromisoformat(str(first["time"]))
    assert abs((datetime.now(timezone.utc) - told).total_seconds()) < 10
    assert second["message"] == 'quotes " and\nlines'
    assert second["fields"] == {"device": "pi-2", "step": 7}
    assert is_structured()


def test_an_error_has_its_number_and_where_it_arose(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO", "json", "fed")
    for error in (ModelDiffersError("why"), ValueError("what")):
        try:
            raise error
        except (ModelDiffersError, ValueError):
            log.exception("it broke")
    first, second = lines(capsys)
    assert first["error"] == "SFL-602"
    assert second["error"] == "ValueError"
    assert "test_logs.py" in str(first["traceback"])


def test_text_is_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO")
    log.info("%d steps", 3)
    text = capsys.readouterr().err
    assert text.endswith(" INFO 3 steps\n")
    assert not is_structured()
    assert logging.getLogger("sfl").propagate is False
