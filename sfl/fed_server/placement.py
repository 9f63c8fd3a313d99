"""Where an adapter belongs, as the edge server says that proposes version 0."""

from __future__ import annotations

from dataclasses import dataclass

from sfl.adapters.layout import AdapterLayout
from sfl.fed_server.agreement import Agreement
from sfl.fed_server.members import Member


@dataclass(frozen=True)
class Placement:
    """Where an adapter sits in the uncut model: path of the block list, paths of the head, number of blocks."""

    blocks: str
    head: tuple[str, ...]
    num_layers: int

    def layout(self, edge: Member, agreement: Agreement) -> AdapterLayout:
        """Of the federation that has `edge` and this agreement."""
        return AdapterLayout(
            base_model=edge.base_model,
            model_fingerprint=edge.model_fingerprint,
            task=edge.task,
            lora=edge.lora,
            blocks=self.blocks,
            head=self.head,
            num_layers=self.num_layers,
            labels=agreement.labels,
            columns=agreement.columns,
            max_length=agreement.max_length,
        )
