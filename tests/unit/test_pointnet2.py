"""PointNet++: what its modules compute, and its conversion through the code that ResNets use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sigmabranch as sb
from conftest import randomise
from sigmabranch.backbones import PointNet2Spec, as_backbone
from sigmabranch.backbones.pointnet2 import PointSet, SetAbstraction
from sigmabranch.errors import ConfigError, DataError
from sigmabranch.points import farthest_points

SPEC = PointNet2Spec(
    centroids=(16, 8),
    radii=(0.5, 1.0),
    neighbours=(6, 4),
    widths=((8, 12), (12, 16), (16, 24, 32)),
    connected=(24, 12),
    classes=5,
)
TREE = sb.TreeSpec(projection_dim=8, widths=(20, 12))


def clouds(number: int, points: int = 24) -> Tensor:
    return torch.randn(number, points, 3, generator=torch.Generator().manual_seed(1)) / 2


@pytest.fixture(scope="module")
def dense():
    return randomise(SPEC.build()).eval()


@pytest.fixture(scope="module")
def loader():
    x, y = clouds(60), torch.arange(60) % 5
    return list(zip((x * (1 + y[:, None, None])).split(20), y.split(20), strict=True))


@pytest.fixture(scope="module")
def net(dense, loader):
    return sb.convert(dense, loader, TREE, spec=sb.ConversionSpec(norm_samples=0))


@torch.no_grad()
def test_a_set_abstraction_describes_each_ball_by_its_maxima():
    module = randomise(SetAbstraction(2, (7,), centroids=3, radius=0.6, neighbours=4)).eval()
    xyz, feature = clouds(2, 10), torch.randn(2, 10, 2)
    centre, found = module(PointSet(xyz, feature))
    chosen = farthest_points(xyz, 3)
    for cloud in range(2):
        for number, middle in enumerate(chosen[cloud].tolist()):
            gaps = (xyz[cloud] - xyz[cloud, middle]).square().sum(-1)
            near = (gaps <= 0.36).nonzero().flatten()[:4]
            group = torch.cat([xyz[cloud, near] - xyz[cloud, middle], feature[cloud, near]], -1)
            assert torch.equal(centre[cloud, number], xyz[cloud, middle])
            expected = module.layers(group).amax(0)
            assert torch.allclose(found[cloud, number], expected, atol=1e-5)


@torch.no_grad()
def test_points_beyond_the_balls_order_do_not_matter(dense):
    """Each ball takes its first neighbours: copies of the last point at the end change nothing."""
    x = clouds(3)
    longer = torch.cat([x, x[:, -1:].expand(-1, 5, -1)], dim=1)
    assert torch.allclose(dense(x), dense(longer), atol=1e-6)


def test_channels_beyond_the_coordinates_are_features():
    spec = PointNet2Spec.from_dict({**SPEC.to_dict(), "channels": 6})
    model = randomise(spec.build()).eval()
    x = torch.cat([clouds(2), torch.randn(2, 24, 3)], dim=-1)
    other = x.clone()
    other[..., 3:] += 1
    with torch.no_grad():
        assert not torch.allclose(model(x), model(other))


def test_a_batch_of_one_cloud_trains_and_leaves_the_vectors_statistics_alone():
    still = PointNet2Spec.from_dict({**SPEC.to_dict(), "dropout": 0.0})
    model = randomise(still.build()).train()
    before = model.fc1[1].running_mean.clone()
    model(clouds(1)).sum().backward()
    assert torch.equal(model.fc1[1].running_mean, before)
    assert model.fc1[0].weight.grad.isfinite().all() and model.fc1[0].weight.grad.any()
    model(clouds(2))
    assert not torch.equal(model.fc1[1].running_mean, before)


def test_sampling_and_grouping_do_not_break_a_compiled_graph(dense):
    compiled = torch.compile(dense, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(clouds(2)), dense(clouds(2)), atol=1e-6)


def test_it_is_cut_exactly_by_the_code_that_cuts_resnets(net, loader):
    errors = [c["max_error"] for stages in net.record["nodes"].values() for c in stages]
    assert len(errors) == 6 and max(errors) <= 1e-5
    with torch.no_grad():
        soft, hard = net.soft(loader[0][0]), net.hard(loader[0][0])
    rows = torch.arange(20)
    assert torch.allclose(hard.logits, soft.logits[rows, hard.leaf], atol=1e-5)
    assert len(hard.leaf.unique()) > 1


def test_the_first_layer_over_all_points_stays_whole_and_the_others_shrink(net):
    section = net.specializer((0,)).state_dict()
    assert section["sa3.layers.0.0.weight"].shape == (16, 3 + 16)
    assert section["sa3.layers.1.0.weight"].shape == (15, 16)  # 24 · 20/32
    assert section["sa3.layers.2.0.weight"].shape == (20, 15)
    assert net.head((0, 0)).state_dict()["fc2.0.weight"].shape == (6, 12)


def test_nodes_that_keep_everything_give_the_dense_logits(dense, loader):
    tree = sb.TreeSpec(projection_dim=8, widths=(32, 24))
    net = sb.convert(dense, loader, tree, spec=sb.ConversionSpec(norm_samples=0))
    with torch.no_grad():
        difference = net.soft(loader[0][0]).logits - dense(loader[0][0])[:, None]
    assert difference.abs().max() <= 1e-5


def test_a_level_may_begin_at_a_set_abstraction_that_samples(dense, loader):
    """Its feature is a point set: routers, cuts and hard batches must carry both tensors."""
    net = sb.convert(dense, loader, sb.TreeSpec(projection_dim=8, cuts=("sa2", "sa3")))
    assert net.record["widths"] == [11, 12]  # 16/√2 of sa2, 24/2 of fc1
    x = loader[0][0]
    with torch.no_grad():
        soft, hard = net.soft(x), net.hard(x)
    assert torch.allclose(hard.logits, soft.logits[torch.arange(20), hard.leaf], atol=1e-5)


def test_it_comes_back_from_disk_without_a_skeleton(net, loader, tmp_path):
    net.save(tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(sb.load(tmp_path / "net")(loader[0][0]), net(loader[0][0]))


def test_one_cloud_alone_gives_what_it_gives_in_a_batch(net, loader):
    x = loader[0][0]
    with torch.no_grad():
        assert torch.allclose(net(x[3:4]), net(x)[3:4], atol=1e-5)


def test_its_spec_survives_json_and_refuses_what_makes_no_network():
    assert PointNet2Spec.from_dict(SPEC.to_dict()) == SPEC
    for bad in (
        {"centroids": [16]},
        {"centroids": [8, 16]},
        {"radii": [0.5, 0]},
        {"widths": [[8], [], [8]]},
        {"connected": []},
        {"channels": 2},
        {"dropout": 1.0},
        {"stages": 3},
    ):
        with pytest.raises(ConfigError):
            PointNet2Spec.from_dict({**SPEC.to_dict(), **bad})


@pytest.mark.parametrize(
    ("shape", "said"),
    [((3, 32, 32), "clouds"), ((24, 6), "model.channels=6"), ((12, 3), "centroids")],
)
def test_data_that_do_not_fit_are_refused(shape, said):
    with pytest.raises(DataError, match=said):
        SPEC.check_input(shape)


def test_narrowing_keeps_the_sampling():
    narrow = SPEC.narrowed(0.5, 1)
    assert narrow.widths == ((4, 6), (6, 8), (8, 12, 17)) and narrow.connected == (12, 6)
    assert (narrow.centroids, narrow.neighbours) == (SPEC.centroids, SPEC.neighbours)


def test_no_other_module_is_taken_for_a_pointnet2():
    with pytest.raises(ConfigError, match="no adapter"):
        as_backbone(torch.nn.Sequential(torch.nn.Linear(3, 4)))
