"""Model configuration: every switch of the method, its validation, and the presets (DESIGN section 1)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dfengine.errors import ConfigError

ACTIVATIONS = ("gelu", "silu", "relu")
MODES = ("norm-guided", "averaged", "iterative")
PIXEL_RANGES = ("unit", "signed")
PAPERS = ("diff-fastener", "diffusionad")

_MULTIPLIERS: dict[int, tuple[float, ...]] = {
    32: (1, 2, 3, 4),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes a detector's function: networks, noise schedule, inference and score.

    Raises `ConfigError` on construction when a field is out of range or fields do not fit each other.

    `paper`: whose training recipe `--recipe paper` follows.
    Images: `image_size` (pixels, square), `channels` (3), `pixel_range` ("unit" = [0, 1], "signed" = [-1, 1]).
    Schedule: `timesteps`, `beta_start`, `beta_end` (linear, DF Eq. 2).
    Reconstruction U-Net (DF 3.1, 4.4; DAD 4.2): `base`, `multipliers` (default by `image_size`), `blocks` per encoder
    level, `attention_factors` (downsampling factors with self-attention), `heads`, `activation`, `skip_every`
    (Sparse-Skip: decoder block j joins its encoder partner when j % skip_every == 0), and the middle block's
    `dilation`, `channel_attention`, `spatial_attention` (DACM) with CBAM `reduction`.
    Segmentation U-Net (DAD 3.2): `seg_base`, `seg_activation`.
    Inference (DF 3.3): `mode`, `tau` (boundary between the two noise scales in training), `t_s`, `t_b` (zero-based),
    `guidance` (w), `noise_draws` averaged. Score: mean of the max(1, round(`top_k` H W / 65536)) largest map pixels.
    """

    preset: str = "custom"
    paper: str = "diff-fastener"
    image_size: int = 256
    channels: int = 3
    pixel_range: str = "unit"
    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    base: int = 128
    multipliers: tuple[float, ...] = ()
    blocks: int = 2
    attention_factors: tuple[int, ...] = (8, 16, 32)
    heads: int = 4
    activation: str = "gelu"
    skip_every: int = 3
    dilation: int = 2
    channel_attention: bool = True
    spatial_attention: bool = True
    reduction: int = 16
    seg_base: int = 64
    seg_activation: str = "gelu"
    mode: str = "norm-guided"
    tau: int = 300
    t_s: int = 200
    t_b: int = 400
    guidance: float = 1.0
    noise_draws: int = 1
    top_k: float = 50.0

    def __post_init__(self):
        if not self.multipliers:
            if self.image_size not in _MULTIPLIERS:
                sizes = ", ".join(map(str, _MULTIPLIERS))
                size = self.image_size
                raise ConfigError(f"image size must be one of {sizes}, not {size} (another needs `multipliers`)")
            object.__setattr__(self, "multipliers", _MULTIPLIERS[self.image_size])
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        object.__setattr__(self, "attention_factors", tuple(self.attention_factors))
        self._validate()

    def _validate(self) -> None:
        def need(ok: bool, message: str) -> None:
            if not ok:
                raise ConfigError(message)

        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = type(field.default)
            if kind is float and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            else:
                need(type(value) is kind, f"{field.name} must be {kind.__name__}, not {value!r}")
        for name, most in (("base", 4096), ("blocks", 16), ("heads", 256), ("skip_every", 64), ("dilation", 64),
                           ("reduction", 4096), ("seg_base", 1024), ("noise_draws", 1024)):  # fmt: skip
            value = getattr(self, name)
            need(1 <= value <= most, f"{name} must be between 1 and {most}, not {value}")
        need(self.base % 2 == 0, f"base must be even (the time embedding is half sine, half cosine), not {self.base}")
        need(self.channels == 3, f"channels must be 3, not {self.channels}")
        need(self.activation in ACTIVATIONS, f"activation must be one of {ACTIVATIONS}, not {self.activation!r}")
        need(self.seg_activation in ACTIVATIONS, f"seg_activation must be one of {ACTIVATIONS}")
        need(self.paper in PAPERS, f"paper must be one of {PAPERS}, not {self.paper!r}")
        need(self.mode in MODES, f"mode must be one of {MODES}, not {self.mode!r}")
        need(self.pixel_range in PIXEL_RANGES, f"pixel_range must be one of {PIXEL_RANGES}, not {self.pixel_range!r}")
        need(1 < self.timesteps <= 100_000, "timesteps must be between 2 and 100000")
        need(0 < self.beta_start <= self.beta_end < 1, "need 0 < beta_start <= beta_end < 1")
        need(0 < self.tau < self.timesteps, f"tau must be between 1 and {self.timesteps - 1}")
        need(0 <= self.t_s < self.timesteps and 0 <= self.t_b < self.timesteps, "t_s and t_b must be below timesteps")
        guided = self.t_s < self.tau <= self.t_b
        need(self.mode != "norm-guided" or guided, "norm-guided needs t_s < tau <= t_b")
        need(0 <= self.guidance <= 1e6, "guidance must be a number of at least 0")
        need(0 < self.top_k <= 65536, "top_k is a number of pixels of 65536: between 0 and 65536")
        need(1 <= len(self.multipliers) <= 8, "between 1 and 8 levels")
        need(all(type(m) in (int, float) for m in self.multipliers), "multipliers must be numbers")
        widths = [m * self.base for m in self.multipliers]
        fit = all(4 <= w <= 16384 and w % 4 == 0 for w in widths)
        need(fit, f"level widths {widths} must be multiples of 4, at most 16384")
        need(all(type(f) is int and f >= 1 for f in self.attention_factors), "attention_factors must be integers")
        need(all(int(w) % self.heads == 0 for w in widths), f"level widths {widths} must be divisible by heads")
        step = max(2 ** (len(self.multipliers) - 1), 32)
        need(self.image_size % step == 0, f"image_size must be a multiple of {step}, not {self.image_size}")
        need(32 <= self.image_size <= 2048, "image_size must be between 32 and 2048")

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed; a new `image_size` brings its default multipliers unless given, and the
        score of a `-tiny` preset keeps its number of pixels."""
        size = changes.get("image_size", self.image_size)
        if size != self.image_size:
            if self.multipliers == _MULTIPLIERS.get(self.image_size):
                changes.setdefault("multipliers", ())
            if self.preset.endswith("-tiny"):
                changes.setdefault("top_k", self.top_k * (self.image_size / size) ** 2)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` inverts it."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Any) -> ModelConfig:
        """Inverse of `to_dict`. Raises `ConfigError` for unknown fields and bad values."""
        if not isinstance(values, dict):
            raise ConfigError("the model configuration is not a table of fields")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown model configuration fields: {', '.join(map(str, unknown))}")
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except TypeError as error:
            raise ConfigError(f"bad model configuration: {error}") from None


_PLAIN_MIDDLE = dict(dilation=1, channel_attention=False, spatial_attention=False)
_DIFFUSIONAD = dict(paper="diffusionad", activation="silu", seg_activation="relu", skip_every=1, **_PLAIN_MIDDLE)
_METHODS: dict[str, dict[str, Any]] = {
    "diff-fastener": {},
    "diffusionad": _DIFFUSIONAD,
    "diffusionad-v1": dict(_DIFFUSIONAD, mode="averaged", t_s=100, t_b=200),
    "iterative": dict(mode="iterative"),
}
_SIZES: dict[str, dict[str, Any]] = {
    "": {},
    "-small": dict(base=32, seg_base=16),
    "-tiny": dict(base=16, seg_base=16, image_size=64, pixel_range="signed", top_k=800.0),  # 50 pixels of 64 x 64
}
PRESETS: dict[str, ModelConfig] = {
    method + size: ModelConfig(preset=method + size, **{**method_fields, **size_fields})
    for method, method_fields in _METHODS.items()
    for size, size_fields in _SIZES.items()
}


def preset(name: str, **changes: Any) -> ModelConfig:
    """The configuration called `name` (a key of `PRESETS`) with `changes` applied. Raises `ConfigError`."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name].replace(**changes) if changes else PRESETS[name]
