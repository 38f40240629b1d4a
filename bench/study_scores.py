"""Image scores that the study compares, from maps and reconstructions of one run.

`seg@K`: mean of the K largest pixels (of 65536, as `ModelConfig.top_k`) of the segmentation map. `pixel`, `gradient`,
`ssim`: the reconstruction error as mean absolute difference, difference of Sobel magnitudes, and 1 - SSIM, each
smoothed and averaged over its largest 5%. `sum:<error>`: segmentation and error, each as (logit or log) deviations from
its own normals, added.
"""

from __future__ import annotations

import cv2
import numpy as np

from dfengine.engine.modules import top_k_count

TOP_K = (50, 200, 800, 2500, 8000)
ERRORS = ("pixel", "gradient", "ssim")
ERROR_SHARE = 0.05


def scores(images: np.ndarray, maps: np.ndarray, reconstructions: np.ndarray, normal: np.ndarray) -> dict:
    """Name -> (N,) scores of uint8 images (N, S, S, 3), maps (N, S, S), reconstructions (N, S, S, 3) in [0, 1].
    `normal` (N,) marks the images whose scores set the scale of the sums."""
    size = images.shape[1]
    ranked = -np.sort(-maps.reshape(len(maps), -1), axis=1)
    result = {f"seg@{k}": ranked[:, : top_k_count(size, size, k)].mean(axis=1) for k in TOP_K}
    count = max(1, round(ERROR_SHARE * size * size))
    errors = {name: [] for name in ERRORS}
    for image, reconstruction in zip(images, reconstructions, strict=True):
        for name, error in error_maps(image.astype(np.float32) / 255, reconstruction).items():
            errors[name].append(np.sort(error.ravel())[-count:].mean())
    result |= {name: np.array(values) for name, values in errors.items()}
    segmentation = np.log(result["seg@800"] + 1e-6) - np.log(1 - result["seg@800"] + 1e-6)
    for name in ERRORS:
        parts = (segmentation, np.log(result[name] + 1e-6))
        result[f"sum:{name}"] = sum((p - p[normal].mean()) / (p[normal].std() + 1e-9) for p in parts)
    return result


def error_maps(image: np.ndarray, reconstruction: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> (S, S) error of a reconstruction, both float32 (S, S, 3) in [0, 1]."""
    sigma = image.shape[0] / 40
    smooth = lambda a: cv2.GaussianBlur(a, (0, 0), sigma)  # noqa: E731
    pixel = np.abs(image - reconstruction).mean(axis=-1)
    a, b = (cv2.cvtColor(x.astype(np.float32), cv2.COLOR_RGB2GRAY) for x in (image, reconstruction))
    edges = [np.hypot(cv2.Sobel(x, cv2.CV_32F, 1, 0), cv2.Sobel(x, cv2.CV_32F, 0, 1)) for x in (a, b)]
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    cov = smooth(a * b) - mean_a * mean_b
    ssim = (2 * mean_a * mean_b + 1e-4) * (2 * cov + 9e-4)
    ssim /= (mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)
    return {"pixel": smooth(pixel), "gradient": smooth(np.abs(edges[0] - edges[1])), "ssim": 1 - ssim}
