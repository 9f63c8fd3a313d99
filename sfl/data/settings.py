"""What a device is told about its data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Task = Literal["classification", "causal-lm"]
Format = Literal["auto", "zeek", "delimited", "semicolon", "jsonl", "text"]
Partition = Literal["iid", "label-skew"]

BEHAVIOUR_COLUMNS = (
    "proto",
    "service",
    "duration",
    "orig_bytes",
    "resp_bytes",
    "conn_state",
    "missed_bytes",
    "history",
    "orig_pkts",
    "orig_ip_bytes",
    "resp_pkts",
    "resp_ip_bytes",
)
DEFAULT_TEXT_COLUMNS = ("text",)


class DataSettings(BaseModel):
    """Where the examples come from, what a prompt holds, and how examples are divided."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: Path = Field(description="file with the examples")
    format: Format = Field("auto", description="format of the file; auto tells it from the content and the name")
    columns: tuple[str, ...] = Field(
        BEHAVIOUR_COLUMNS, min_length=1, description="columns of a flow that its prompt holds; id.resp_p is left out by default"
    )
    text_columns: tuple[str, ...] = Field(
        DEFAULT_TEXT_COLUMNS, min_length=1, description="columns or JSON fields that hold the text; several are joined by ' || '"
    )
    label_column: str | None = Field(
        None, description="column or JSON field of the label; by default label, and for flows detailed-label where it is set"
    )
    drop_repeats: bool = Field(True, description="keep one of the examples that have the same content and the same label")
    split: Literal["hash", "time"] = Field(
        "hash", description="by content, so that identical content is never in two splits, or by time, the latest for the test"
    )
    validation: float = Field(0.1, ge=0, lt=1, description="fraction of the examples for validation")
    test: float = Field(0.2, ge=0, lt=1, description="fraction of the examples for the test")
    part_index: int = Field(0, ge=0, description="which part of the file is this device's, counted from 0")
    part_count: int = Field(1, ge=1, description="number of devices that share the file")
    partition: Partition = Field("iid", description="how a shared file is divided: evenly, or with uneven labels")
    partition_alpha: float = Field(0.5, gt=0, description="Dirichlet concentration of label-skew; smaller is more uneven")
    partition_seed: int = Field(0, ge=0, description="seed of the division, the same on all devices that share the file")
    max_examples: int | None = Field(None, ge=1, description="use at most this many of the device's own examples, evenly spaced")

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test together must be less than 1, so that something is left to train on")
        if self.part_index >= self.part_count:
            raise ValueError(f"part_index {self.part_index} must be less than part_count {self.part_count} (parts count from 0)")
        return self
