"""Import of the public DiffusionAD checkpoint format (DESIGN section 2, "Checkpoints").

A public checkpoint is a `torch.save` file of ``{n_epoch, unet_model_state_dict, seg_model_state_dict, args}``. It is
read by `torch_file`, which runs nothing of it. Bytes are read only for tensors that the model has, in the shapes that
the model has, so a file cannot ask for more memory than its own model needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dfengine.checkpoint import Checkpoint, check_output, save_checkpoint
from dfengine.errors import CheckpointError, ConfigError, UsageError
from dfengine.files import os_reason
from dfengine.models import ModelConfig, build_model
from dfengine.models import preset as preset_config
from dfengine.torch_file import LegacyTorchFile, TensorRecord, ZipTorchFile, open_torch_file, printable
from dfengine.wording import counted

_PUBLIC_TOP_K = 50
_MAX_NUMBER = 2**31  # no setting of the public code comes near it
_PREFIXES = {"unet_model_state_dict": "reconstruction.", "seg_model_state_dict": "segmentation."}


@dataclass(frozen=True)
class ConvertSummary:
    """What `convert` did. `epoch` is the public file's `n_epoch`, None where it had none."""

    source: Path
    out: Path
    config: ModelConfig
    tensors: int
    parameters: int
    epoch: int | None

    def __str__(self) -> str:
        c, epoch = self.config, "" if self.epoch is None else f", epoch {self.epoch}"
        return (
            f"{self.out}: {c.preset}, {c.image_size}x{c.image_size}, base {c.base}, {counted(c.heads, 'head')}{epoch}; "
            f"{self.tensors} tensors, {self.parameters:,} parameters. Not calibrated."
        )


def convert(
    source: str | Path,
    out: str | Path,
    preset: str = "diffusionad",
    image_size: int | None = None,
    heads: int | None = None,
) -> ConvertSummary:
    """Write the public DiffusionAD checkpoint `source` as the dfengine checkpoint `out` (safetensors).

    Widths, levels and attention places are read from the weights; image size and heads from `args`, unless given
    here; schedule and inference settings from `args`, where it has them, else from `preset`. Weights keep their values
    exactly: float32 as it is, float16 and bfloat16 widened to float32.

    Raises `CheckpointError` (damaged, hostile, another layout, or unlike its own `args`), `ConfigError` (unknown
    preset), `UsageError` (`out` is `source`, there already, or does not end in .safetensors), and `DfengineError` when
    `out` cannot be written.
    """
    source, out = Path(source), Path(out)
    if out.exists() and source.exists() and out.samefile(source):
        raise UsageError(f"{out}: the converted checkpoint must not replace its source")
    check_output(out)
    base_config = preset_config(preset)
    try:
        with open(source, "rb") as file:
            archive = open_torch_file(file)
            root = _require_dict(archive.root, "the file")
            records = {}
            for name, prefix in _PREFIXES.items():
                records.update(_records(root, name, prefix))
            args = _require_dict(dict.get(root, "args", {}), "args")
            config = _config(base_config, args, records, image_size, heads)
            state = _read_state(archive, config, records)
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{source}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{source}: {os_reason(error)}") from None
    epoch = dict.get(root, "n_epoch")
    epoch = epoch if type(epoch) is int and abs(epoch) < _MAX_NUMBER else None
    training = {"imported_from": "DiffusionAD", "source": source.name, "epochs": epoch}
    save_checkpoint(out, Checkpoint(config=config, state=state, training=training, calibration=None))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(config).parameters())
    return ConvertSummary(source, out, config, len(state), parameters, epoch)


def _require_dict(value: object, what: str) -> dict:
    if not isinstance(value, dict):
        raise CheckpointError(f"not a DiffusionAD checkpoint: {what} is not a dictionary")
    return value


def _records(root: dict, name: str, prefix: str) -> dict[str, TensorRecord]:
    """The tensors of one state dict under our names; the `module.` of DataParallel is dropped.

    `dict.items` is called by name because a pickle can put an attribute called `items` on an OrderedDict.
    """
    if name not in root:
        raise CheckpointError(f"not a DiffusionAD checkpoint: it has no {name}")
    state = _require_dict(root[name], name)
    if not all(type(key) is str and type(value) is TensorRecord for key, value in dict.items(state)):
        raise CheckpointError(f"not a DiffusionAD checkpoint: {name} holds something other than tensors")
    parallel = all(key.startswith("module.") for key in dict.keys(state))
    return {prefix + (key[7:] if parallel else key): value for key, value in dict.items(state)}


def _config(
    base: ModelConfig,
    args: dict,
    records: Mapping[str, TensorRecord],
    image_size: int | None,
    heads: int | None,
) -> ModelConfig:
    """The configuration of the public model. Raises `CheckpointError` when `args` and weights contradict each other.

    The public code reads absent keys of `args` from a ``defaultdict(str)``, so "" means absent.
    """

    def number(name: str, default: float | None) -> Any:
        value = dict.get(args, name)
        if value is None or value == "":
            return default
        if type(value) not in (int, float) or not abs(value) < _MAX_NUMBER:
            raise CheckpointError(f"args[{name!r}] is not a number in range: {_show(value)}")
        return value

    def text(name: str, default: str) -> None:
        if dict.get(args, name) not in (None, "", default):
            raise CheckpointError(f"args[{name!r}] is {_show(args[name])}; only {default!r} is supported")

    text("beta_schedule", "linear")
    text("noise_fn", "gauss")
    if number("num_head_channels", -1) != -1:
        raise CheckpointError("args['num_head_channels'] is set; only a fixed number of heads is supported")

    size = image_size if image_size is not None else _image_size(dict.get(args, "img_size"))
    heads = heads if heads is not None else number("num_heads", None)
    for value, name, option in ((size, "img_size", "image_size"), (heads, "num_heads", "heads")):
        if value is None:
            raise CheckpointError(f"its args do not give {name!r}, and the weights do not show it; set {option}")
    timesteps = number("T", base.timesteps)
    if timesteps < 1 or size < 1:
        raise CheckpointError(f"{timesteps} timesteps at {size} pixels cannot be")
    shapes = _shapes(base.blocks, records)
    said = {
        "base_channels": (number("base_channels", shapes["base"]), shapes["base"]),
        "channel_mults": (_numbers(dict.get(args, "channel_mults")) or shapes["multipliers"], shapes["multipliers"]),
        "channels": (number("channels", shapes["channels"]), shapes["channels"]),
    }
    for name, (value, found) in said.items():
        if value != found:
            raise CheckpointError(f"args[{name!r}] is {value}, but the weights have {found}")

    return base.replace(
        **shapes,
        image_size=size,
        heads=heads,
        timesteps=timesteps,
        # The public linear schedule is stretched so that any T ends at the same noise.
        beta_start=1000 / timesteps * 1e-4,
        beta_end=1000 / timesteps * 2e-2,
        tau=number("less_t_range", base.tau),
        t_s=number("eval_normal_t", base.t_s),
        t_b=number("eval_noisier_t", base.t_b),
        guidance=number("condition_w", base.guidance),
        # The public score is the mean of 50 pixels at any size; `top_k` counts per 65536 pixels.
        top_k=min(65536.0, _PUBLIC_TOP_K * 65536 / size**2),
    )


def _numbers(value: object) -> tuple[float, ...] | None:
    """`channel_mults` as the public files have it: a list, a tuple, "1,2,4", or nothing."""
    if value is None or value == "":
        return None
    try:
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(int(n) if n == int(n) else n for n in map(float, parts))
    except (TypeError, ValueError, OverflowError):
        raise CheckpointError(f"args['channel_mults'] is not a list of numbers: {_show(value)}") from None


def _image_size(value: object) -> int | None:
    """`img_size` as the public files have it: [256, 256], 256, or nothing."""
    if value is None or value == "":
        return None
    sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else (value, value)
    if any(type(side) is not int or not 1 <= side < _MAX_NUMBER for side in sides):
        raise CheckpointError(f"args['img_size'] is not a size in pixels: {_show(value)}")
    if sides[0] != sides[1]:
        raise CheckpointError(f"args['img_size'] is {sides[0]}x{sides[1]}; only square images are supported")
    return sides[0]


def _shapes(blocks: int, records: Mapping[str, TensorRecord]) -> dict[str, Any]:
    """The configuration fields that the weights fix: base, multipliers, attention_factors, channels, seg_base.

    `down.0` is the first conv; then each level has `blocks` entries and, but for the last, one that halves the size.
    `args["attention_resolutions"]` is not consulted: the public code does not pass it to its model.
    Raises `CheckpointError` where the tensors that tell are missing.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in records:
            raise CheckpointError(f"tensor missing: {_public_name(name)}")
        if len(records[name].shape) != rank:
            raise CheckpointError(f"{_public_name(name)} has shape {records[name].shape}, not {rank} axes")
        return records[name].shape

    base = shape("reconstruction.time_embedding.1.weight", 2)[1]
    channels = shape("reconstruction.down.0.0.weight", 4)[1]
    seg_base = shape("segmentation.encoder_segment.block1.0.weight", 4)[0]
    entries = {name.split(".")[2] for name in records if name.startswith("reconstruction.down.")}
    if base < 1 or len(entries) % (blocks + 1) or len(entries) > 8 * (blocks + 1):
        raise CheckpointError(f"its encoder has {len(entries)} entries, which {blocks} blocks a level cannot have")
    multipliers, attention = [], []
    for level in range(len(entries) // (blocks + 1)):
        first = f"reconstruction.down.{1 + level * (blocks + 1)}"
        multiplier = shape(f"{first}.0.out_layers.3.weight", 4)[0] / base
        multipliers.append(int(multiplier) if multiplier == int(multiplier) else multiplier)
        if f"{first}.1.to_qkv.weight" in records:
            attention.append(2**level)
    return dict(
        base=base,
        channels=channels,
        seg_base=seg_base,
        multipliers=tuple(multipliers),
        attention_factors=tuple(attention),
    )


def _show(value: object) -> str:
    """A setting in a message. Containers only by their type: a pickle can make small ones that print endlessly."""
    if type(value) is str:
        return repr(printable(value))
    return str(value) if type(value) is float or (type(value) is int and abs(value) < 2**64) else type(value).__name__


def _public_name(name: str) -> str:
    network, _, rest = name.partition(".")
    return f"{'unet' if network == 'reconstruction' else 'seg'} {printable(rest)}"


def _read_state(
    archive: ZipTorchFile | LegacyTorchFile, config: ModelConfig, records: Mapping[str, TensorRecord]
) -> dict[str, torch.Tensor]:
    """The tensors of the model of `config`, by our names. Every mismatch is named before any byte is read."""
    with torch.device("meta"):
        expected = build_model(config).state_dict()
    # BatchNorm's step counter takes no part in inference; old files lack it.
    missing = [name for name in expected if name not in records and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in records if name not in expected]
    wrong = [name for name in expected if name in records and records[name].shape != tuple(expected[name].shape)]
    for names, what in ((missing, "missing"), (unexpected, "unexpected"), (wrong, "of the wrong shape")):
        if names:
            listed = ", ".join(_listed(names, records, expected))
            raise CheckpointError(f"{counted(len(names), 'tensor')} {what}: {listed}")
    state = {}
    for name, tensor in expected.items():
        if name in records:
            state[name] = _read_tensor(archive, name, records[name], tensor.dtype)
        else:
            state[name] = torch.zeros_like(tensor, device="cpu")
    return state


def _listed(
    names: list[str], records: Mapping[str, TensorRecord], expected: Mapping[str, torch.Tensor]
) -> Iterator[str]:
    for name in names[:5]:
        both = name in records and name in expected
        yield _public_name(name) + (f" {records[name].shape} for {tuple(expected[name].shape)}" if both else "")
    if len(names) > 5:
        yield f"and {len(names) - 5} more"


def _read_tensor(
    archive: ZipTorchFile | LegacyTorchFile, name: str, record: TensorRecord, dtype: torch.dtype
) -> torch.Tensor:
    """One tensor as `dtype`, which must hold every value of its saved type."""
    saved = record.storage.dtype
    if saved != dtype and not (dtype == torch.float32 and saved in (torch.float16, torch.bfloat16)):
        raise CheckpointError(f"{_public_name(name)} is {saved}, which {dtype} cannot hold exactly")
    tensor = archive.tensor(record).to(dtype)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{_public_name(name)} holds values that are not finite")
    return tensor
