"""Whether other settings of inference rank better, by trained checkpoints and without test labels.

    python bench/score_inference.py --out RESULTS.json CHECKPOINT=NORMALS ... [fasteners=CHECKPOINT]

The sets are those of bench/score_pixels.py. Each setting is one change of the checkpoint's own: noise draws averaged
(with the same noise for all images), t_s, t_b and w. Writes the image AUROC of each kind of anomaly on each set, and
prints their means over the sets, in Markdown.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from score_pixels import aurocs, parsed, sets, write  # noqa: E402

from dfengine.detector import Detector  # noqa: E402
from dfengine.models import ModelConfig  # noqa: E402


def settings(config: ModelConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, change of the configuration), the first without one."""
    yield "as trained", {}
    for draws in (2, 4):
        yield f"{draws} noise draws", {"noise_draws": draws}
    for name, value in (("t_s", config.t_s // 2), ("t_s", config.t_s * 7 // 5), ("t_b", config.t_b * 4 // 5)):
        yield f"{name} {value}", {name: value}
    yield f"t_b {config.t_b * 13 // 10}", {"t_b": config.t_b * 13 // 10}
    for share in (0.5, 2):
        yield f"w {config.guidance * share:g}", {"guidance": config.guidance * share}


def main() -> int:
    arguments, results = parsed(__doc__), []
    for name, checkpoint, images, kinds in sets(arguments.pairs, arguments.work):
        found = {}
        for setting, change in settings(checkpoint.config):
            changed = replace(checkpoint, config=checkpoint.config.replace(**change))
            by_kind = aurocs(Detector(changed, precision="bfloat16"), images, kinds, [changed.config.top_k])
            found[setting] = {kind: value for kind, (value,) in by_kind.items()}
        results.append({"set": name, "images": len(kinds), "top_k": checkpoint.config.top_k, "auroc": found})
        print(f"{name}: done", flush=True)
    write(arguments.out, results)
    kinds = list(results[0]["auroc"]["as trained"])
    print("| setting | " + " | ".join(kinds) + " |\n" + "|---" * (len(kinds) + 1) + "|")
    for setting in results[0]["auroc"]:
        means = [mean(result["auroc"][setting][kind] for result in results) for kind in kinds]
        print(f"| {setting} | " + " | ".join(f"{value:.3f}" for value in means) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
