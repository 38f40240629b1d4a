"""score: every implementation against the float64 reference, exactly in its choice of pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dfengine import native
from dfengine.engine.modules import image_score, top_k_count
from dfengine.kernels import CannotRunError, score
from tests.kernels import launchers
from tests.kernels.contract import assert_numeric_contract
from tests.kernels.slices import widened

# (M, N, H, W), k: one pixel; fewer groups than k; odd sizes; more groups than k; several maps.
CASES = [
    ((1, 1, 1, 1), 1),
    ((1, 3, 9, 11), 40),
    ((2, 1, 37, 41), 3),
    ((3, 1, 32, 36), 9),
]


@pytest.fixture(params=launchers.names(score.CONFIGURATIONS))
def launcher(request, monkeypatch):
    return launchers.launcher(request.param, monkeypatch, score.CONFIGURATIONS)


def make(shape, dtype=torch.float32, seed=0) -> torch.Tensor:
    """Logits around -2.3, with a blob of high ones in each image."""
    generator = torch.Generator().manual_seed(seed)
    logits = -2.3 + torch.randn(shape, generator=generator)
    height, width = shape[2:]
    logits[:, :, height // 3 : height // 2, width // 3 : width // 2] += 4
    return logits.to(dtype)


def run_into_nan(launcher, logits, k, threshold=0.5, extra=0, workspace=None):
    """(anomaly_map, pred_score, pred_label); `extra`: channels around the logits."""
    device, (_, batch, height, width) = launcher.device, logits.shape
    wide = widened(logits[..., None].to(device), extra, extra // 2)
    anomaly_map = torch.full((batch, height, width), float("nan"), device=device)
    pred_score = torch.full((batch,), float("nan"), device=device)
    pred_label = torch.full((batch,), 7, dtype=torch.uint8, device=device)
    limit = score.threshold_tensor(threshold, device)
    inputs = wide if extra else wide[..., 0]
    launcher.run(score.OP, inputs, limit, k, anomaly_map, pred_score, pred_label.view(torch.bool), workspace)
    assert set(pred_label.tolist()) <= {0, 1}
    return anomaly_map.cpu(), pred_score.cpu(), pred_label.cpu().bool()


@pytest.mark.parametrize(
    "dtype, extra", [(torch.float32, 0), (torch.float32, 3), (torch.float16, 0), (torch.bfloat16, 3)], ids=str
)
def test_meets_the_numeric_contract(launcher, dtype, extra):
    for number, (shape, k) in enumerate(CASES):
        logits = make(shape, dtype, number)
        results = run_into_nan(launcher, logits, k, extra=extra)
        limit = score.threshold_tensor(0.5)
        exact = score.reference(logits.double(), limit, k)
        torchs = score.reference(logits, limit, k)
        for result, exact_part, torch_part in zip(results[:2], exact[:2], torchs[:2], strict=True):
            assert_numeric_contract(result, exact_part, torch_part)
        assert torch.equal(results[2], results[1] > 0.5)


def test_the_k_largest_are_exact(launcher):
    """Against a sort of the implementation's own map: a wrong pixel would show far above the rounding of the sum."""
    generator = torch.Generator().manual_seed(0)
    values = {
        "distinct": torch.randn((1, 1, 40, 40), generator=generator),
        "ties": torch.randint(-2, 3, (1, 1, 40, 40), generator=generator).float(),
        "one high": torch.where(torch.arange(1600).view(1, 1, 40, 40) == 1599, 5.0, -9.0),
        "far apart": 20 * torch.randn((1, 1, 40, 40), generator=generator),
    }
    for name, logits in values.items():
        for k in (1, 14, 700):  # of 13 groups
            anomaly_map, pred_score, _ = run_into_nan(launcher, logits, k)
            exact = anomaly_map.double().flatten(1).sort(descending=True).values[:, :k].mean(dim=1)
            assert ((pred_score - exact).abs() <= 1e-6 * exact).all(), (name, k)


def test_extreme_logits(launcher):
    logits = torch.tensor([-1e4, -200.0, -90.0, -1e-3, 0.0, 1e-3, 90.0, 1e4, float("inf"), -float("inf")])
    anomaly_map, pred_score, _ = run_into_nan(launcher, logits.view(1, 1, 2, 5), 3)
    error = (anomaly_map.flatten().double() - logits.double().sigmoid()).abs().max()
    assert error < 2e-7  # on a GPU an approximate power and quotient, of 2 ulp each
    assert anomaly_map.min() >= 0 and anomaly_map.max() == 1 and pred_score == 1


def test_scores_do_not_exceed_one(launcher):
    _, pred_score, _ = run_into_nan(launcher, torch.full((3, 1, 30, 30), 100.0), 49)
    assert pred_score == 1


def test_nan_gives_a_nan_score_and_no_label(launcher):
    for sign in (1, -1):
        logits = make((2, 3, 20, 30))
        logits[1, 1, 19, 29] = torch.tensor(float("nan")).copysign(torch.tensor(sign))
        anomaly_map, pred_score, pred_label = run_into_nan(launcher, logits, 5, threshold=-1.0)
        assert anomaly_map.isnan().sum() == 1 and anomaly_map[1, 19, 29].isnan()
        assert pred_score.isnan().tolist() == [False, True, False]
        assert pred_label.tolist() == [True, False, True]


def test_labels_are_above_the_threshold(launcher):
    logits = make((1, 2, 9, 8))
    _, pred_score, pred_label = run_into_nan(launcher, logits, 3, threshold=None)
    assert not pred_label.any()
    at, below = pred_score[0].item(), torch.nextafter(pred_score[0], torch.tensor(0.0)).item()
    assert not run_into_nan(launcher, logits, 3, threshold=at)[2][0]
    assert run_into_nan(launcher, logits, 3, threshold=below)[2][0]


def test_threshold_tensors_decide_as_float64():
    rng = np.random.default_rng(0)
    for threshold in (*rng.random(200), *np.float64(rng.random(50).astype(np.float32)), 0.0, 1.0):
        near = np.float32(threshold)
        scores = np.array([np.nextafter(near, np.float32(-1)), near, np.nextafter(near, np.float32(2))])
        decided = torch.from_numpy(scores) > score.threshold_tensor(threshold)
        assert decided.tolist() == (scores.astype(np.float64) > threshold).tolist()


def test_runs_agree_bit_for_bit_whatever_the_batch(launcher):
    logits = make((2, 4, 31, 43))
    first = run_into_nan(launcher, logits, 9)
    for one, other in zip(first, run_into_nan(launcher, logits, 9), strict=True):
        assert torch.equal(one, other)
    if launcher.backend == "reference":  # torch computes the last values of a tensor in another way than the others
        return
    for one, part in zip(first, run_into_nan(launcher, logits[:, [3, 1]], 9), strict=True):
        assert torch.equal(part, one[[3, 1]])


def test_a_used_workspace_changes_nothing(launcher):
    logits = make((1, 2, 31, 43))
    workspace = score.new_workspace(2, 31, 43, launcher.device).fill_(-1)
    fresh = run_into_nan(launcher, logits, 9)
    for _ in range(2):
        for one, other in zip(fresh, run_into_nan(launcher, logits, 9, workspace=workspace), strict=True):
            assert torch.equal(one, other)


def test_the_reference_is_the_score_of_the_modules():
    logits = make((1, 3, 64, 64))
    k = top_k_count(64, 64)
    anomaly_map, pred_score, _ = score.reference(logits, score.threshold_tensor(0.5), k)
    assert torch.equal(anomaly_map, logits[0].sigmoid())
    assert torch.equal(pred_score, image_score(anomaly_map))


@pytest.mark.skipif(not native.available(), reason="dfengine._native is missing")
def test_cpu_threads_change_nothing():
    launcher, threads, results = launchers.Launcher("cpu", "cpu"), torch.get_num_threads(), []
    try:
        for count in (1, 3, 64):
            torch.set_num_threads(count)
            results.append(run_into_nan(launcher, make((2, 3, 70, 90)), 17))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert torch.equal(one, other)


def test_the_op_takes_the_best_backend_or_the_forced_one(monkeypatch):
    monkeypatch.delenv("DFENGINE_BACKEND", raising=False)
    logits = make((1, 2, 16, 20))
    limit = score.threshold_tensor(0.5)
    assert score.OP.choose(logits, limit, 5, None, None, None) == ("cpu" if native.available() else "reference")
    automatic, forced = score.score(logits, 0.5, 5), score.score(logits[..., None], limit, 5, backend="reference")
    for one, other in zip(automatic, forced, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    score.score_into(logits, limit, 5, *(outputs := [torch.empty_like(t) for t in automatic]))
    assert all(torch.equal(one, other) for one, other in zip(outputs, automatic, strict=True))
    with pytest.raises(CannotRunError, match="float64"):
        score.score(logits.double(), 0.5, 5, backend="cpu")


def test_custom_op_is_registered_soundly():
    arguments = (make((1, 2, 4, 5)), score.threshold_tensor(0.5), 3, "")
    torch.library.opcheck(torch.ops.dfengine.score, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(logits=torch.zeros(2, 4, 4)), r"\(M, N, H, W\)"),
        (dict(logits=torch.zeros(1, 2, 4, 4, 2)), r"\(M, N, H, W\)"),
        (dict(logits=torch.zeros(1, 2, 4, 4).transpose(2, 3)), "logits: strides"),
        (dict(k=0), "k = 0"),
        (dict(k=17), "k = 17"),
        (dict(logits=torch.zeros(0, 2, 4, 4)), "0 maps"),
        (dict(threshold=torch.zeros(2)), "threshold"),
        (dict(threshold=torch.zeros(1).double()), "threshold"),
        (dict(anomaly_map=torch.zeros(2, 4, 5)), "anomaly_map: expected"),
        (dict(anomaly_map=torch.zeros(2, 4, 8)[..., ::2]), "not contiguous"),
        (dict(pred_score=torch.zeros(2).half()), "pred_score: expected"),
        (dict(pred_label=torch.zeros(2)), "pred_label: expected"),
        (dict(workspace=torch.zeros((2, 1), dtype=torch.int32)), "workspace: expected"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    arguments = dict(logits=torch.zeros(1, 2, 4, 4), threshold=torch.zeros(1), k=3, anomaly_map=torch.zeros(2, 4, 4))
    arguments |= dict(pred_score=torch.zeros(2), pred_label=torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        score.score_into(**{**arguments, **changes})


@pytest.mark.gpu
def test_gpu_takes_triton_and_agrees_with_the_reference():
    logits, limit = make((1, 16, 256, 256)), score.threshold_tensor(0.5)
    results = score.score(logits.cuda(), 0.5, 50)
    exact, torchs = score.reference(logits.double(), limit, 50), score.reference(logits, limit, 50)
    for got, exact_part, torch_part in zip(results[:2], exact[:2], torchs[:2], strict=True):
        assert_numeric_contract(got.cpu(), exact_part, torch_part)
