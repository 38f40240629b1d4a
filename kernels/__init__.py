"""The fused ops: one file each, and the table of which implementation serves which op on which device.

An op is called through its file (``dfengine.kernels.ingest.ingest``); ``OPS`` holds them by name.
"""

from __future__ import annotations

from dfengine.kernels import (
    attention,
    attention_cpu,  # noqa: F401  (registers itself)
    channel_attention,
    conv2d,
    conv2d_cpu,  # noqa: F401  (likewise)
    conv2d_cuda,  # noqa: F401  (likewise)
    conv2d_library,  # noqa: F401  (likewise)
    copy,
    group_norm,
    group_norm_apply,
    group_norm_merge,
    group_norm_moments,
    ingest,
    one_step,
    resample,
    reverse_step,
    score,
)
from dfengine.kernels.registry import BACKENDS, PRIORITY, CannotRunError, Op, forced_backend

__all__ = ["BACKENDS", "OPS", "PRIORITY", "CannotRunError", "Op", "forced_backend", "table"]

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        ingest.OP,
        conv2d.OP,
        group_norm.OP,
        group_norm_moments.OP,
        group_norm_merge.OP,
        group_norm_apply.OP,
        channel_attention.OP,
        attention.OP,
        copy.OP,
        one_step.OP,
        reverse_step.OP,
        resample.UPSAMPLE,
        resample.MAX_POOL,
        score.OP,
    )
}


def table(device: str) -> list[dict[str, str]]:
    """Rows {"op", "serves", and each backend's status} for `device` ("cpu" or "cuda"), without running anything.

    "serves" is the backend taken when the arguments do not rule it out; a status is "yes" or why the backend is absent.
    """
    rows = []
    for op in OPS.values():
        status = {backend: reason or "yes" for backend, reason in op.status(device).items()}
        rows.append({"op": op.name, "serves": op.default(device), **status})
    return rows
