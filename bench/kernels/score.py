"""What is timed and compiled for the op `score` (bench/kernels.py, bench/kernels_check.py)."""

from __future__ import annotations

import itertools

import torch

from bench.kernels import FLOAT_TYPES, TRITON_TYPES, Case
from bench.kernels.one_step import DTYPES
from dfengine.kernels import score

SHAPES = [(1, 1, 256, 256), (1, 16, 256, 256), (1, 1, 512, 512)]


def cases(device: str):
    """

    make() returns fresh tensors (logits, threshold, anomaly_map, pred_score, pred_label, workspace); rivals maps a name
    to a function of those, "kernel" being the op. Outputs are touched beforehand, so that no page fault is timed.
    """
    for shape, dtype in itertools.product(SHAPES, DTYPES[device]):
        generator = torch.Generator().manual_seed(0)

        def make(shape=shape, dtype=dtype, generator=generator):
            batch = shape[1]
            return (
                (torch.randn(shape, generator=generator) - 3).to(device, dtype),
                score.threshold_tensor(0.5, device),
                torch.zeros(shape[1:], device=device),
                torch.zeros(batch, device=device),
                torch.zeros(batch, dtype=torch.bool, device=device),
                score.new_workspace(*shape[1:], device).zero_(),
            )

        logits, _, anomaly_map, *_ = make()
        yield Case(
            shape, dtype, logits.nbytes + anomaly_map.nbytes, make, {"kernel": kernel, "torch": torch_composition}
        )


def _k(logits) -> int:
    return max(1, round(50 * logits.shape[2] * logits.shape[3] / 65536))


def kernel(logits, threshold, anomaly_map, pred_score, pred_label, workspace) -> None:
    score.OP(logits, threshold, _k(logits), anomaly_map, pred_score, pred_label, workspace)


def torch_composition(logits, threshold, anomaly_map, pred_score, pred_label, workspace) -> None:
    """What the op replaces in torch eager."""
    torch.sigmoid(logits[0].float(), out=anomaly_map)
    torch.mean(anomaly_map.flatten(1).topk(_k(logits), dim=1).values, dim=1, out=pred_score)
    torch.gt(pred_score, threshold, out=pred_label)


def compilations():
    """Yield (label, kernel, signature, constants, options) for every shipped configuration and type."""
    for configuration, dtype, maps in itertools.product(score.CONFIGURATIONS, FLOAT_TYPES, (1, 2)):
        constants = {"GROUP": score.GROUP, "GROUPS": configuration["GROUPS"], "MAPS": maps}
        types = {"logits": "*" + TRITON_TYPES[dtype], "anomaly_map": "*fp32", "workspace": "*i32"}
        label = f"map {TRITON_TYPES[dtype]} M={maps}"
        yield _compilation(label, score.score_map_kernel, types, constants, configuration)
    for configuration in score.CONFIGURATIONS:
        constants = {"GROUP": score.GROUP, "GROUPS": configuration["GROUPS"], "KEYS": configuration["KEYS"]}
        types = dict.fromkeys(("anomaly_map", "threshold", "pred_score"), "*fp32")
        types |= {"workspace": "*i32", "pred_label": "*u8"}
        yield _compilation(
            f"select KEYS={configuration['KEYS']}", score.score_select_kernel, types, constants, configuration
        )


def _compilation(label, kernel, types, constants, configuration):
    groups, warps = configuration["GROUPS"], configuration["num_warps"]
    types = types | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    return f"{label} GROUPS={groups} warps={warps}", kernel, signature, constants, {"num_warps": warps}
