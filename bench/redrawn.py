"""Save a preset's model with redrawn weights as a checkpoint: something to tune and profile where nothing is trained.

    python bench/redrawn.py diff-fastener OUT.safetensors
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "bench"]
sys.path.append(str(ROOT))

from dfengine.checkpoint import Checkpoint, save_checkpoint  # noqa: E402
from dfengine.models import PRESETS, build_model, preset  # noqa: E402
from tests.helpers import redraw  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    model = redraw(build_model(preset(arguments.preset)))
    save_checkpoint(arguments.out, Checkpoint(model.config, model.state_dict()))


if __name__ == "__main__":
    main()
