"""Rows measured in several runs come together where they are of one machine."""

from __future__ import annotations

import json

import pytest
import torch

from bench import measuring, rivals, throughput

HEAD = {"device": "cpu", "commit": "abc", "torch": "2", "threads": 2, "tactics": "default"}


def row(batch: int, ms: float) -> dict:
    return {"case": "detect", "preset": "tiny", "size": 64, "batch": batch, "precision": "float32", "ms": ms}


def test_a_row_measured_again_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "rows.json"
    assert measuring.rows_of(path, HEAD) == []
    path.write_text(json.dumps(HEAD | {"rows": [row(1, 5.0), row(2, 7.0)]}))
    kept = measuring.rows_of(path, HEAD)
    new = [row(1, 4.0), row(4, 9.0)]
    assert throughput.merged(kept, new) == [{"commit": "abc"} | row(2, 7.0), *new]


@pytest.mark.parametrize("key", ["device", "torch", "threads", "tactics", "clock"])
def test_rows_of_another_machine_are_left(tmp_path, key):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(HEAD | {key: "other", "rows": [row(1, 5.0)]}))
    assert measuring.rows_of(path, HEAD) == []


def test_a_rival_of_another_device_says_so():
    for name in ("tensorrt", "none"):
        with pytest.raises(ValueError, match="TensorRT runs on a GPU|no rival is called none"):
            rivals.rival(name, lambda autocast: torch.nn.Identity(), [torch.zeros(1)], "float16")


def test_eight_bits_are_timed_beside_the_half_precision_of_the_rivals():
    of = throughput.ranges_of("diff-fastener-tiny", 32, "cpu")
    assert len(of) > 20 and all(low <= 0 < high for low, high in of.values())
    assert {*rivals.HALF_BESIDE, *rivals.HALF_BESIDE.values()} <= set(throughput.AGREEMENT)
    with pytest.raises(ValueError, match="it is for eight bits"):
        rivals.rival("openvino-int8", lambda autocast: torch.nn.Identity(), [torch.zeros(1)], "bfloat16")
