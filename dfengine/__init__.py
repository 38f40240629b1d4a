"""dfengine: diffusion-based visual anomaly detection, made for railway fasteners.

    import dfengine

    detector = dfengine.load("clips.safetensors")
    detection = detector.detect("photos/")
    detection.pred_score, detection.pred_label, detection.anomaly_map
"""

from __future__ import annotations

import importlib

from dfengine._version import __version__
from dfengine.errors import DfengineError

TYPE_CHECKING = False  # type checkers know the name; typing would take longer to import than all of this
if TYPE_CHECKING:
    from dfengine.detection import Detection
    from dfengine.detector import Detector, load

__all__ = ["Detection", "Detector", "DfengineError", "__version__", "load"]

# Looked up on first use, so that `import dfengine` does not wait for torch.
_LAZY = {"Detection": "dfengine.detection", "Detector": "dfengine.detector", "load": "dfengine.detector"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'dfengine' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
