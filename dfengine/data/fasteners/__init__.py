"""Procedural pictures of railway fasteners, with exact defect masks.

The demo task of dfengine: near-vertical inspection crops, rail on the left, made from geometry (height field, normals,
sun and sky, cast shadows). `scene` samples what is in the picture, `clips` and `track` draw it on a `canvas`, `light`
turns the canvas into a photograph, `render` ties them together and `dataset` writes an MVTec-style folder.
"""

from __future__ import annotations

from dfengine.data.fasteners.dataset import write_fasteners
from dfengine.data.fasteners.render import render_fastener
from dfengine.data.fasteners.scene import DEFECTS

__all__ = ["DEFECTS", "render_fastener", "write_fasteners"]
