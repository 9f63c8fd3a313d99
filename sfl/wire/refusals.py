"""An error's number on the wire: beside the message that ends a call, so that whoever called shows the same number."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import grpc.aio

from sfl.errors import SflError

_KEY = "sfl-error"


async def refuse(context: grpc.aio.ServicerContext[Any, Any], code: grpc.StatusCode, error: SflError) -> NoReturn:
    """End a call with `error`'s message and number."""
    await context.abort(code, str(error), ((_KEY, str(error.number)),))


def number_of(error: grpc.RpcError) -> int | None:
    """The number that the other side gave with a failed call; None where it gave none, or one that is none."""
    read = getattr(error, "trailing_metadata", None)
    found = [value for key, value in (read() if read is not None else None) or () if key == _KEY]
    text = found[0] if found and isinstance(found[0], str) else ""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 3 else None
