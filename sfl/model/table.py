"""An embedding whose table stays in its file: the rows that a batch needs are read from there, and nothing else of it."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfl.errors import ModelError
from sfl.model.checkpoint import StoredTensor


class StoredEmbedding(nn.Embedding):
    """What a module's class becomes beside its own: its `forward` still ends in that of `nn.Embedding`, which is here.

    `weight` is empty, and tells the dtype and the place of the result; `table` (rows, width) lies in its file in the stored
    dtype. Rows are converted after they are read. They are not mapped into memory, as the system then maps up to 64 KB
    around each row that is touched.
    """

    table: StoredTensor

    def forward(self, input: Tensor) -> Tensor:  # nn.Embedding calls it so
        """Rows of the table: (..., width) in `weight`'s dtype, from int64 `input` (...)."""
        ids, places = torch.unique(input.cpu(), return_inverse=True)
        rows = torch.empty(len(ids), self.embedding_dim, dtype=self.table.dtype)
        if len(ids):
            _read(self.table, ids, rows)
        return functional.embedding(places.to(self.weight.device), rows.to(self.weight))


def keep_stored(module: nn.Module, table: StoredTensor, dtype: torch.dtype) -> None:
    """Make `module` read the rows of `table` from its file instead of holding them; its result is in `dtype`."""
    own: type[nn.Module] = type(module)
    bases = (StoredEmbedding,) if own is nn.Embedding else (own, StoredEmbedding)
    module.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    module.__class__ = type(own.__name__, bases, {"__module__": own.__module__, "table": table})


def _read(table: StoredTensor, ids: Tensor, rows: Tensor) -> None:
    """Fill `rows` with the rows `ids`, which ascend; neighbours are read together."""
    if ids[0] < 0 or ids[-1] >= table.shape[0]:
        raise ModelError(f"token or position {int(ids[-1])} is outside of '{table.name}', which has {table.shape[0]} rows")
    starts = [0, *((ids.diff() != 1).nonzero().flatten() + 1).tolist(), len(ids)]
    for first, last in pairwise(starts):
        table.read_rows(int(ids[first]), rows[first:last])
