"""What several tests of this folder are given."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.daemons.machines import Machines


@pytest.fixture
def machines() -> Iterator[Machines]:
    """Four machines on one switch."""
    with Machines() as made:
        yield made
