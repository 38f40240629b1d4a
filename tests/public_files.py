"""Files in the public DiffusionAD format, of a small model, for the tests of their import."""

from __future__ import annotations

import collections
import functools

import torch

from dfengine.models import build_model, preset

TINY = preset("diffusionad", image_size=32, base=8, seg_base=4, heads=2, attention_factors=(4, 8))


def public_args(**changes):
    """The keys of the public args file, in its types, for the TINY model."""
    args = collections.defaultdict(str)
    args.update(
        img_size=[32, 32], Batch_Size=16, EPOCHS=3000, T=1000, base_channels=8, beta_schedule="linear", loss_type="l2",
        diffusion_lr=1e-4, seg_lr=1e-5, random_slice=True, weight_decay=0.0, dropout=0, channels=3, num_heads=2,
        attention_resolutions="32,16,8", num_head_channels=-1, noise_fn="gauss", less_t_range=300, condition_w=1,
        eval_normal_t=200, eval_noisier_t=400, output_path="outputs", arg_num="1",
    )  # fmt: skip
    args["channel_mults"], args["loss_weight"]  # the public code leaves "" behind by reading keys that are absent
    args.update(changes)
    return args


@functools.cache
def tiny_model():
    torch.manual_seed(0)
    model = build_model(TINY).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():  # fresh weights are partly zero: redraw everything
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.4 + 0.1)
            else:
                tensor.fill_(7)
    return model


def public_content(args=None):
    model = tiny_model()
    return {
        "n_epoch": 3000,
        "unet_model_state_dict": model.reconstruction.state_dict(),
        "seg_model_state_dict": model.segmentation.state_dict(),
        "args": public_args() if args is None else args,
    }


def save(path, content, **options):
    torch.save(content, path, **options)
    return path


def outputs(model):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 32, 32, generator=generator)
    pair = torch.randn(2, 6, 32, 32, generator=generator)
    with torch.no_grad():
        return model.reconstruction(x, torch.tensor([3, 400])), model.segmentation(pair)
