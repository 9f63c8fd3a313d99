"""What all models of settings have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of all settings: never changed once read, and no key that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def written(self) -> dict[str, Any]:
        """Plain values that are read back to the same settings; those that are None are left out."""
        return self.model_dump(mode="json", exclude_none=True)
