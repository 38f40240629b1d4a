from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dfengine.models import Model, build_model, cost, preset
from dfengine.models.blocks import AttentionBlock, GroupNorm, ResBlock
from tests.helpers import redraw
from tests.helpers import tiny_config as tiny


def test_published_costs():
    dense = cost(preset("diffusionad"))
    assert dense.reconstruction_parameters == 131_654_403
    assert dense.segmentation_parameters == 28_373_569
    assert dense.reconstruction_flops / 1e9 == pytest.approx(563.17, abs=0.01)
    assert dense.segmentation_flops / 1e9 == pytest.approx(76.03, abs=0.01)
    sparse = cost(preset("diffusionad", skip_every=3))
    assert sparse.reconstruction_parameters == 118_144_003
    assert sparse.reconstruction_flops / 1e9 == pytest.approx(489.02, abs=0.01)
    assert cost(preset("diff-fastener")).image_flops / 1e12 == pytest.approx(1.054, abs=0.001)


@pytest.mark.parametrize("size", [32, 64, 128, 256, 512])
def test_every_size_builds_and_keeps_its_shape(size):
    config = preset("diff-fastener", image_size=size, base=32)
    with torch.device("meta"):
        model = Model(config)
        images = torch.empty(2, 3, size, size)
        assert model.reconstruction(images, torch.empty(2, dtype=torch.int64)).shape == images.shape
        assert model.segmentation(torch.empty(2, 6, size, size)).shape == (2, 1, size, size)
    attended = {
        size // s for s in (8, 16, 32) if 2 ** (len(config.multipliers) - 1) >= s
    }
    blocks = [m for m in model.reconstruction.down.modules() if isinstance(m, AttentionBlock)]
    assert len(blocks) == config.blocks * len(attended)


def test_512_halves_the_first_convolution():
    with torch.device("meta"):
        model = Model(preset("diff-fastener", image_size=512))
    assert model.reconstruction.down[0][0].weight.shape == (64, 3, 3, 3)


def test_state_names_are_the_public_ones():
    with torch.device("meta"):
        names = set(Model(preset("diffusionad")).state_dict())
    for name in (
        "time_embedding.1.weight", "time_embedding.3.bias", "down.0.0.weight", "down.1.0.in_layers.0.weight",
        "down.1.0.in_layers.2.bias", "down.1.0.embed_layers.1.weight", "down.1.0.out_layers.0.weight",
        "down.1.0.out_layers.3.weight", "down.10.1.norm.weight", "down.10.1.to_qkv.weight", "middle.1.proj_out.bias",
        "middle.2.in_layers.2.weight", "up.0.0.skip_connection.weight", "up.17.0.out_layers.3.bias", "out.0.weight",
        "out.2.weight",
    ):  # fmt: skip
        assert "reconstruction." + name in names, name
    for name in (
        "encoder_segment.block1.0.weight", "encoder_segment.block6.4.running_var", "decoder_segment.up_b.1.weight",
        "decoder_segment.db_b.3.weight", "decoder_segment.up4.2.running_mean", "decoder_segment.db4.0.bias",
        "decoder_segment.fin_out.0.weight",
    ):  # fmt: skip
        assert "segmentation." + name in names, name


def test_sparse_skip_joins_once_per_level():
    model = build_model(tiny(skip_every=3))
    assert model.reconstruction.joins == [True, False, False] * 2
    assert build_model(tiny(skip_every=1)).reconstruction.joins == [True] * 6
    assert build_model(tiny(skip_every=2)).reconstruction.joins == [True, False, True] * 2


def test_the_new_network_predicts_zero_and_every_block_matters_once_redrawn():
    model = build_model(tiny())
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([3, 700])
    assert model.reconstruction(x, t).abs().max() == 0
    network = redraw(model.reconstruction).eval()
    with torch.no_grad():
        full = network(x, t)
        for name, module in network.named_modules():
            if isinstance(module, ResBlock | AttentionBlock):
                handle = module.register_forward_hook(lambda m, args, out: torch.zeros_like(out))
                changed = network(x, t)
                handle.remove()
                assert not torch.allclose(full, changed, atol=1e-3), f"{name} does not reach the output"
        assert not torch.allclose(full[1], network(x, torch.tensor([3, 20]))[1], atol=1e-4)


@pytest.mark.parametrize("change", [
    dict(dilation=1), dict(channel_attention=False), dict(spatial_attention=False), dict(activation="silu"),
    dict(skip_every=1), dict(attention_factors=()),
])  # fmt: skip
def test_every_switch_changes_the_function(change):
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([100])
    outputs = []
    for config in (tiny(), tiny(**change)):
        with torch.no_grad():
            outputs.append(redraw(build_model(config).reconstruction)(x, t))
    assert not torch.allclose(*outputs, atol=1e-3)


def test_the_middle_without_dacm_is_the_plain_block():
    plain = dict(dilation=1, channel_attention=False, spatial_attention=False)
    keys = build_model(tiny(**plain)).reconstruction.middle[0].state_dict().keys()
    assert keys == build_model(tiny()).reconstruction.down[1][0].state_dict().keys()
    middle = build_model(tiny()).reconstruction.middle
    assert middle[0].in_layers[2].dilation == middle[2].out_layers[3].dilation == (2, 2)
    assert middle[0].channel_attention.mlp[0].bias is None


def test_attention_equals_the_textbook_form_in_float64():
    block = redraw(AttentionBlock(16, 4)).double()
    x = torch.randn(2, 16, 5, 3, dtype=torch.float64) - 2.3
    b, c, h, w = x.shape
    qkv = F.conv1d(block.norm(x).reshape(b, c, h * w), block.to_qkv.weight, block.to_qkv.bias)
    q, k, v = qkv.reshape(b * 4, 3 * 4, h * w).split(4, dim=1)
    weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / 2.0, dim=-1)
    out = torch.einsum("bts,bcs->bct", weights, v).reshape(b, c, h * w)
    expected = x + F.conv1d(out, block.proj_out.weight, block.proj_out.bias).view(b, c, h, w)
    torch.testing.assert_close(block(x), expected)


def test_attention_takes_the_fused_path_and_half_precision_makes_no_float_copy():
    block = AttentionBlock(32, 4)
    x = torch.randn(1, 32, 16, 16).to(torch.bfloat16, memory_format=torch.channels_last)
    with torch.profiler.profile() as trace, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    names = {event.key for event in trace.key_averages()}
    assert any("flash_attention_for_cpu" in name for name in names)
    assert out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last)
    assert not any("softmax" in name for name in names)


def test_group_count():
    assert [GroupNorm(c).num_groups for c in (16, 48, 80, 128, 224, 1024)] == [4, 12, 20, 32, 32, 32]
    assert 336 % GroupNorm(336).num_groups == 0
