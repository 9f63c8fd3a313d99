"""What daemons under test find in their environment."""

from __future__ import annotations

import os

_KEPT = {name: value for name, value in os.environ.items() if not name.upper().startswith("SFL_")}
ENVIRONMENT = {**_KEPT, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
