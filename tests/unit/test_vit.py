"""The small vision transformer: its names, its arithmetic, its sizes and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import sigmabranch as sb
from conftest import randomise
from sigmabranch.backbones import FAMILIES, ViTSpec, as_backbone
from sigmabranch.backbones.timm import create_timm
from sigmabranch.errors import ConfigError, DataError
from sigmabranch.peers import dense_of_size
from sigmabranch.saving import load_dense, save_dense
from sigmabranch.tasks import count_task, find_task
from sigmabranch.training import Recipe
from sigmabranch.training.optim import build_optimizer

SPEC = ViTSpec(image_size=16, patch=4, width=24, depth=2, heads=3, in_channels=1, classes=5)


@pytest.fixture
def vit():
    return randomise(SPEC.build())


def params(spec: ViTSpec) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in spec.build().parameters())


def test_it_computes_what_timms_does_from_the_same_weights(vit, timm):
    theirs = create_timm(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        in_chans=1,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=5,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
    ).eval()
    theirs.load_state_dict(vit.state_dict())
    x = torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        assert torch.allclose(vit(x), theirs(x), atol=1e-5)


def test_tokens_mix_by_attention_and_know_their_place(vit):
    x = torch.randn(2, 1, 16, 16)
    turned = x.roll(4, dims=3)  # the same patches elsewhere
    with torch.no_grad():
        assert not torch.allclose(vit(x), vit(turned), atol=1e-3)
        vit.pos_embed.zero_()
        assert torch.allclose(vit(x), vit(turned), atol=1e-5)


def test_attention_is_softmax_over_the_tokens_of_the_same_image(vit):
    attention, x_BTD = vit.blocks[0].attn, torch.randn(2, 16, 24)
    q, k, v = (
        part.view(2, 16, 3, 8).transpose(1, 2) for part in attention.qkv(x_BTD).chunk(3, dim=2)
    )
    mixed = F.softmax(q @ k.transpose(2, 3) / 8**0.5, dim=3) @ v
    expected = attention.proj(mixed.transpose(1, 2).reshape(2, 16, 24))
    assert torch.allclose(attention(x_BTD), expected, atol=1e-5)


def test_positions_biases_and_norms_are_not_decayed(vit):
    decayed, plain = build_optimizer(vit, Recipe(weight_decay=0.1)).param_groups
    assert plain["weight_decay"] == 0
    assert any(parameter is vit.pos_embed for parameter in plain["params"])
    assert all(parameter.ndim >= 2 for parameter in decayed["params"])


def test_the_task_has_the_parameters_it_promises():
    # 6 · (12·128² + 13·128), patches 6,272, positions 8,192, last norm 256, head 12,900
    assert params(find_task("cifar100-vit").model) == 1_217_252


@pytest.mark.parametrize("factor", [0.31, 0.5, 0.66, 0.75, 0.98])
def test_a_narrow_one_shrinks_by_the_factors_square(factor):
    spec = ViTSpec()
    narrow = spec.narrowed(factor, 0)
    assert narrow.width % spec.heads == 0 and (narrow.depth, narrow.heads) == (6, 4)
    blocks = [4 * s.width**2 + 2 * s.width * s.hidden for s in (narrow, spec)]
    assert blocks[0] == pytest.approx(factor**2 * blocks[1], rel=0.005)
    assert spec.narrowed(factor, 3).hidden == narrow.hidden + 3


@pytest.mark.parametrize("share", [0.2, 0.37, 0.5, 0.61, 0.8])
def test_any_size_is_met_within_one_percent(share):
    spec = ViTSpec()
    goal = round(share * params(spec))
    assert params(dense_of_size(spec, goal)) == pytest.approx(goal, rel=0.01)


def test_its_spec_survives_json_and_refuses_what_makes_no_network():
    assert FAMILIES["vit"].from_dict(SPEC.to_dict()) == SPEC
    for bad in (
        {"patch": 5},
        {"heads": 5},
        {"width": 0},
        {"depth": 0},
        {"mlp_ratio": 0},
        {"mlp_ratio": 0.001},
        {"mlp_ratio": math.inf},
        {"tokens": 3},
    ):
        with pytest.raises(ConfigError):
            ViTSpec.from_dict({**SPEC.to_dict(), **bad})


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((128, 3), "takes images"),
        ((3, 16, 16), "model.in_channels=3"),
        ((1, 32, 32), "model.image_size=32"),
        ((1, 16, 20), "square images, these are 16 x 20"),
    ],
)
def test_data_that_do_not_fit_are_refused(shape, said):
    SPEC.check_input((1, 16, 16))
    with pytest.raises(DataError, match=said):
        SPEC.check_input(shape)


def test_it_comes_back_from_disk_without_a_skeleton(vit, tmp_path):
    save_dense(vit, tmp_path / "dense")
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(load_dense(tmp_path / "dense")(x), vit(x))


def test_it_can_be_cut_at_every_block_and_keeps_its_residual_stream(vit):
    backbone = as_backbone(vit)
    assert backbone.stages == tuple(f"blocks.{number}" for number in range(SPEC.depth))
    tree = sb.TreeSpec.balanced(1, cuts=("blocks.1",), projection_dim=8)
    net = sb.convert(vit, [(torch.randn(8, 1, 16, 16), torch.zeros(8).long())], tree)
    assert net.record["widths"] == [SPEC.width] and net.record["shares"] == [0.5]
    errors = [node["max_error"] for stages in net.record["nodes"].values() for node in stages]
    assert max(errors) < 1e-9


def test_its_task_counts_a_path(vit):
    counted = count_task(find_task("cifar100-vit"))
    assert counted["net"]["active_params"] < counted["dense"]["params"]
