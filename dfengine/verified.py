"""Records of `dfengine verify --record`, which a checkpoint keeps by precision: their form, and what they say."""

from __future__ import annotations

from typing import Any

from dfengine.errors import CheckpointError
from dfengine.kernels.quantization import is_range
from dfengine.wording import counted


def check_records(records: Any, name: str) -> None:
    """Raises `CheckpointError` where these JSON values of the file `name` are no table of records by precision."""
    if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
        raise CheckpointError(f"{name}: metadata field 'verified' is not a table of records")
    for precision, record in records.items():
        refused = record.get("refused", [])
        if not isinstance(refused, list) or not all(isinstance(reason, str) for reason in refused):
            raise CheckpointError(f"{name}: the reasons why {precision} was refused are not a list of texts")
        if not _are_ranges(record.get("ranges", {})):
            raise CheckpointError(f"{name}: the ranges verified for {precision} are not pairs of numbers around 0")


def _are_ranges(ranges: Any) -> bool:
    if not isinstance(ranges, dict):
        return False
    pairs = list(ranges.values())
    numbers = all(isinstance(p, list) and len(p) == 2 and all(type(n) in (int, float) for n in p) for p in pairs)
    return numbers and all(is_range(*pair) for pair in pairs)


def has_labels(record: dict[str, Any]) -> bool:
    """Whether the images it was held to were labelled, sound and defective ones."""
    data = record.get("data")
    return isinstance(data, dict) and bool(data.get("labelled"))


def verdict(record: dict[str, Any]) -> str:
    """As "passed on fasteners (2026-01-31)"."""
    data = record.get("data")
    where = f" on {data['name']}" if isinstance(data, dict) and "name" in data else ""
    where += ", without labels" if isinstance(data, dict) and data.get("labelled") is False else ""
    known = data.get("known") if isinstance(data, dict) else None
    where += f", {counted(known, 'image')} of it from training" if isinstance(known, int) and known > 0 else ""
    word = "was refused" if record.get("refused") else "passed"
    return f"{word}{where}" + (f" ({record['date']})" if "date" in record else "")
