"""What a forked daemon finds imported, in the way that `sfl edge` and `sfl device` import it."""

from __future__ import annotations

import os

from sfl.model.lean_imports import lean_imports
from tests.daemons.environment import ENVIRONMENT

os.environ.update(ENVIRONMENT)
lean_imports()
for name in ("sfl.cli.main", "sfl.device.daemon", "sfl.edge_server.daemon"):
    __import__(name)
