"""What wandb's offline files really hold: after a kill that is less than they were given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# They are LevelDB logs: blocks of records, behind a header of seven bytes in the first block.
_BLOCK, _HEADER = 32768, 7
_WHOLE, _LAST = 1, 4


def offline_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Read the logged rows of one offline run file, up to where it was cut off.

    Args:
        file: ``run-ID.wandb``.

    Yields:
        Values by key.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data, at, record = file.read_bytes(), _HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:
            at += left
            continue
        # checksum (4), length (2), kind (1)
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        at += _HEADER + length
        if kind == 0 or at > len(data):
            return
        record += data[at - length : at]
        if kind not in (_WHOLE, _LAST):
            continue
        try:
            message = Record.FromString(record)
        except DecodeError:
            return
        record = b""
        if message.WhichOneof("record_type") == "history":
            yield {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in message.history.item
            }


def last_offline_step(folder: Path, name: str) -> int:
    """Return the last step in the offline files of a run.

    Args:
        folder: Where wandb writes.
        name: The run's id.

    Returns:
        The step, -1 for none.
    """
    steps = [
        int(row["_step"])
        for file in folder.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb")
        for row in offline_rows(file)
        if "_step" in row
    ]
    return max(steps, default=-1)
