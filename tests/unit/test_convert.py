"""Conversion: exact copies, honest records, an untouched source, and refusals before any work."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sigmabranch as sb
from sigmabranch.backbones import ResNet, ResNetSpec, as_backbone
from sigmabranch.conversion import blueprint, class_targets, select, single_path
from sigmabranch.conversion import growth as growing
from sigmabranch.conversion.calibrate import stream
from sigmabranch.errors import (
    ConfigError,
    ConversionError,
    DataError,
    NumericError,
    UnsupportedOperation,
)
from sigmabranch.tree import node_key

UNEVEN = sb.TreeSpec(leaves=((0,), (1, 0), (1, 1, 0), (1, 1, 1)), projection_dim=16)
TREES = {
    "one level": sb.TreeSpec.balanced(1, projection_dim=16),
    "the paper's": sb.TreeSpec(projection_dim=16),
    "three levels": sb.TreeSpec.balanced(3, projection_dim=16),
    "uneven": UNEVEN,
    "its own cuts": sb.TreeSpec(projection_dim=16, cuts=("layer2", "layer4")),
}
SPECS = {
    "the paper's": sb.ConversionSpec(),
    "old norms": sb.ConversionSpec(norm_samples=0),
    "classes": sb.ConversionSpec(clusters="classes"),
    "random channels": sb.ConversionSpec(channels="random"),
    "even channels": sb.ConversionSpec(channels="uniform"),
    "principal axes": sb.ConversionSpec(projection="pca"),
    "centred and balanced": sb.ConversionSpec(centred=True, balanced=True),
}


def digest(model: nn.Module) -> str:
    tensors = [t.detach().numpy().tobytes() for t in model.state_dict().values()]
    return hashlib.sha256(b"".join(tensors)).hexdigest()


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def everything(tree: sb.TreeSpec, dense: ResNet) -> sb.TreeSpec:
    """The same tree with nodes as wide as their sources."""
    fields = {**tree.to_dict(), "widths": source_widths(tree, dense)}
    return sb.TreeSpec.from_dict(fields)


def source_widths(tree: sb.TreeSpec, dense: ResNet) -> list[int]:
    ends = ("layer2", "layer3", "layer4")[-tree.depth :]
    if tree.cuts:
        ends = ("layer3", "layer4")
    return [dense.get_submodule(end)[-1].conv3.out_channels for end in ends]


def images(batches) -> Tensor:
    return torch.cat([x for x, _ in batches])


@pytest.fixture(scope="module")
def converted(dense, batches) -> sb.SigmaBranchNet:
    return sb.convert(dense, batches, TREES["the paper's"])


# -- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_nodes_that_keep_all_channels_give_the_dense_logits_at_every_leaf(dense, batches, tree):
    spec = sb.ConversionSpec(norm_samples=0)
    net = sb.convert(dense, batches, everything(tree, dense), spec=spec)
    with torch.no_grad():
        logits = net.soft(images(batches)).logits
        expected = dense(images(batches))[:, None].expand_as(logits)
    assert torch.allclose(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in TREES if name != "its own cuts"])
def test_every_node_is_its_source_sliced(dense, batches, name):
    """Traced back by hand: shortcuts, planes and the head."""
    tree = TREES[name]
    net = sb.convert(dense, batches, tree, spec=sb.ConversionSpec(norm_samples=0))
    state = dense.state_dict()
    for leaf in tree.leaves:
        lineage = [
            channels
            for level in range(1, len(leaf) + 1)
            for channels in net.record["nodes"][node_key(leaf[:level])]
        ]
        assert len(lineage) == tree.depth
        copied = {}
        for level in range(1, len(leaf) + 1):
            copied |= net.specializer(leaf[:level]).state_dict()
        arriving = None
        for channels in lineage:
            assert channels["max_error"] <= 1e-5
            stage, block = channels["stage"], f"{channels['stage']}.0"
            source = state[f"{block}.downsample.0.weight"][channels["kept"]]
            if arriving is not None:
                source = source[:, arriving]
            name = f"{stage}.0.downsample.0.weight"
            if name in copied:
                assert torch.equal(copied[name], source)
            planes = channels["inner"][f"{block}.conv1.weight"]
            norm = state[f"{block}.bn1.weight"][planes]
            assert torch.equal(copied[f"{block}.bn1.weight"], norm)
            arriving = channels["kept"]
        head = net.head(leaf).fc
        assert torch.equal(head.weight, state["fc.weight"][:, arriving])
        assert torch.equal(head.bias, state["fc.bias"])


def test_the_trunk_is_copied_verbatim(dense, converted):
    trunk = converted.trunk.state_dict()
    assert trunk
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in trunk.items())


def test_planes_are_the_largest_by_l1_norm_and_the_same_in_both_branches(dense, converted):
    nodes = converted.record["nodes"]
    inner = nodes["0"][0]["inner"]
    assert inner == nodes["1"][0]["inner"]
    weight = dense.state_dict()["layer3.1.conv2.weight"]
    count = round(8 * converted.record["widths"][0] / 32)
    expected = weight.abs().sum((1, 2, 3)).argsort(descending=True)[:count].sort().values
    assert inner["layer3.1.conv2.weight"] == expected.tolist()


def test_a_wrong_copy_is_caught(dense, batches, monkeypatch):
    """The check is alive: a section that reads another channel does not pass."""
    honest = growing.Backbone.section

    def shifted(self, paths, plan=None):
        section = honest(self, paths, plan)
        if plan is not None and "layer3" in section._modules:
            weight = section.layer3[1].conv1.weight
            weight.copy_(weight.roll(1, dims=1))
        return section

    monkeypatch.setattr(growing.Backbone, "section", shifted)
    with pytest.raises(ConversionError, match=r"layer3.*masked dense"):
        sb.convert(dense, batches, TREES["the paper's"])


@pytest.mark.parametrize("training", [True, False])
def test_the_dense_network_is_read_never_changed(dense, batches, training):
    model = copy.deepcopy(dense).train(training)
    before = digest(model)
    net = sb.convert(model, batches, TREES["the paper's"])
    assert digest(model) == before
    assert model.training is training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    mine = {p.data_ptr() for p in model.parameters()}
    assert not mine & {p.data_ptr() for p in net.parameters()}
    assert not net.training
    assert all(p.requires_grad for p in net.parameters())


# -- decisions -----------------------------------------------------------------------------------


def test_routers_send_every_sample_to_its_cluster(batches, converted):
    with torch.no_grad():
        usage = converted.hard(images(batches)).leaf.bincount(minlength=4).tolist()
    splits = converted.record["splits"]
    assert splits["root"]["sizes"] == [usage[0] + usage[1], usage[2] + usage[3]]
    assert sum(splits["root"]["sizes"]) == converted.record["samples"] == 96
    for node in ("0", "1"):
        weight = torch.tensor(splits[node]["gate_weight"])
        assert torch.allclose(weight.norm(dim=1), torch.ones(2))
        assert splits[node]["gate_bias"] == [0.0, 0.0]
    # Norms were re-estimated before the second level was clustered, not after.
    assert [sum(splits[node]["sizes"]) for node in ("0", "1")] == splits["root"]["sizes"]


def test_channels_follow_from_the_recorded_means(converted):
    for node, children in (("root", ("0", "1")), ("1", ("1-0", "1-1"))):
        (stage, mean_KC), *others = converted.record["splits"][node]["channel_mean"].items()
        assert not others
        width = converted.record["widths"][len(children[0].split("-")) - 1]
        expected = select.select_by_activation(torch.tensor(mean_KC).double(), width, 0.5)
        for child, selection in zip(children, expected, strict=True):
            (found,) = converted.record["nodes"][child]
            assert found["stage"] == stage
            assert tuple(found["shared"]) == selection.shared
            assert tuple(found["specific"]) == selection.specific
            assert tuple(found["kept"]) == selection.kept


def test_recorded_means_are_the_dense_networks_pooled_activations(dense, batches, converted):
    x = images(batches)
    with torch.no_grad():
        left = converted.hard(x).leaf < 2
        feature = x
        for name in ("conv1", "bn1", "act1", "layer1", "layer2", "layer3"):
            feature = dense.get_submodule(name)(feature)
        pooled = feature.mean((2, 3))
    found = torch.tensor(converted.record["splits"]["root"]["channel_mean"]["layer3"])
    assert torch.allclose(found[0], pooled[left].mean(0), atol=1e-5)
    assert torch.allclose(found[1], pooled[~left].mean(0), atol=1e-5)


def test_centring_and_balance_reach_the_router(dense, batches):
    net = sb.convert(
        dense, batches, TREES["one level"], spec=sb.ConversionSpec(centred=True, balanced=True)
    )
    assert net.record["splits"]["root"]["sizes"] == [48, 48]
    assert any(net.record["splits"]["root"]["gate_bias"])
    with torch.no_grad():
        assert net.hard(images(batches)).leaf.bincount().tolist() == [48, 48]


def test_class_clusters_send_whole_classes_one_way(dense, batches):
    net = sb.convert(dense, batches, TREES["the paper's"], spec=SPECS["classes"])
    splits = net.record["splits"]
    branch = splits["root"]["class_branch"]
    assert len(branch) == 5
    assert set(branch) == {0, 1}
    labels = torch.cat([y for _, y in batches])
    assert splits["root"]["sizes"] == torch.tensor(branch)[labels].bincount().tolist()
    targets = class_targets(net.record)
    assert targets.shape == (5, 4)
    assert torch.equal(targets.sum(1), torch.ones(5))
    assert torch.equal(targets[:, 2:].sum(1).long(), torch.tensor(branch))
    for node, mean_KC in splits["0"]["channel_mean"].items():
        assert torch.isfinite(torch.tensor(mean_KC)).all(), node


def test_latent_clusters_have_no_class_targets(converted):
    assert class_targets(converted.record) is None


def test_random_channels_are_drawn_uniformly_and_by_seed(dense, batches):
    records = [
        sb.convert(
            dense, batches, TREES["one level"], spec=sb.ConversionSpec(channels="random", seed=seed)
        ).record
        for seed in (0, 0, 1)
    ]
    kept = [record["nodes"]["0"][0]["kept"] for record in records]
    assert kept[0] == kept[1] != kept[2]
    assert records[0]["nodes"]["0"][0]["inner"] == records[2]["nodes"]["0"][0]["inner"]
    assert len(kept[0]) == records[0]["widths"][0]


def test_norms_are_re_estimated_from_each_branchs_own_samples(dense, batches):
    """Turning it off changes running statistics of specializers and nothing else at level 1."""
    tree = TREES["one level"]
    fresh, old = (
        sb.convert(dense, batches, tree, spec=sb.ConversionSpec(norm_samples=n)) for n in (96, 0)
    )
    for name, value in fresh.state_dict().items():
        statistic = name.startswith("specializers") and name.rpartition(".")[2] in (
            "running_mean",
            "running_var",
            "num_batches_tracked",
        )
        assert torch.equal(value, old.state_dict()[name]) is not statistic, name
    assert fresh.record["nodes"]["0"][0]["norm_reestimated"]
    assert not old.record["nodes"]["0"][0]["norm_reestimated"]
    x = images(batches)
    with torch.no_grad():
        mine = x[fresh.hard(x).leaf == 0]
        feature = fresh.trunk(mine)
        block = fresh.specializer((0,)).layer4[0]
        mean = block.conv1(feature).mean((0, 2, 3))
    batchwise = block.bn1.running_mean
    assert (batchwise - mean).abs().max() < 0.2 * mean.abs().max()


def test_norms_of_both_levels_and_their_momentum(dense, batches, converted):
    norms = [m for m in converted.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.1}
    kept = dense.state_dict()["layer4.0.bn3.running_mean"]
    (channels,) = converted.record["nodes"]["0-0"]
    assert channels["norm_reestimated"]
    found = converted.specializer((0, 0)).layer4[0].bn3.running_mean
    assert not torch.equal(found, kept[channels["kept"]])


def test_the_result_depends_on_the_seed_alone(dense, batches):
    first, again, other = (
        sb.convert(dense, batches, TREES["one level"], spec=sb.ConversionSpec(seed=seed))
        for seed in (1, 1, 2)
    )
    assert same_weights(first, again)
    assert first.record == again.record
    assert not same_weights(first, other)
    assert not torch.equal(first.router(()).projection[1].bias, other.router(()).projection[1].bias)


def test_every_router_has_a_projection_of_its_own(converted):
    biases = [converted.router(node).projection[1].bias for node in converted.tree.inner]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(biases, 2))


def test_the_global_generator_is_left_alone(dense, batches):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    sb.convert(dense, batches, TREES["one level"])
    assert torch.equal(torch.get_rng_state(), before)


# -- records -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "kind"),
    [("the paper's", kind) for kind in SPECS]
    # Five classes are too few for three levels of them.
    + [("uneven", kind) for kind in SPECS if kind != "classes"],
)
def test_a_record_survives_json_and_rebuilds_the_same_network(dense, batches, shape, kind):
    tree, spec = TREES[shape], SPECS[kind]
    net = sb.convert(dense, batches, tree, spec=spec)
    record = sb.ConversionRecord.from_dict(json.loads(json.dumps(net.record, allow_nan=False)))
    assert record.to_dict() == net.record
    again = sb.rebuild(dense, record, batches)
    assert same_weights(net, again)
    assert again.record == net.record
    with torch.no_grad():
        x = images(batches)
        assert torch.equal(again.soft(x).logits, net.soft(x).logits)


def test_a_record_of_another_network_is_refused(batches, converted):
    other = ResNet(ResNetSpec(in_channels=1, classes=5, stem="cifar"))
    record = sb.ConversionRecord.from_dict(converted.record)
    with pytest.raises(ConfigError, match="other tensors"):
        sb.rebuild(other, record, batches)


@pytest.mark.parametrize(
    "change",
    [{"schema": 2}, {"tree": None}, {"widths": None}, {"nodes": {"7": []}}, {"splits": {"0": {}}}],
)
def test_what_is_no_record_is_refused(converted, change):
    with pytest.raises(ConfigError):
        sb.ConversionRecord.from_dict({**converted.record, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"clusters": "magic"},
        {"channels": "magic"},
        {"shared_fraction": 1.5},
        {"samples": 0},
        {"restarts": 0},
        {"norm_samples": -1},
        {"affine_samples": -1},
        {"samples": 10.5},
        {"balanced": "yes"},
        {"ratio": 1},
    ],
)
def test_what_is_no_conversion_is_refused(change):
    with pytest.raises(ConfigError):
        sb.ConversionSpec.from_dict(change)


# -- data ----------------------------------------------------------------------------------------


def test_a_loader_may_shuffle(dense, batches):
    labels = torch.cat([y for _, y in batches])
    data = TensorDataset(images(batches), labels)
    torch.manual_seed(0)
    net = sb.convert(dense, DataLoader(data, 32, shuffle=True), TREES["the paper's"])
    sizes = net.record["splits"]["root"]["sizes"]
    with torch.no_grad():
        leaf = net.hard(images(batches)).leaf
    assert [int((leaf < 2).sum()), int((leaf > 1).sum())] == sizes


def test_at_most_so_many_samples_are_read(dense, batches):
    seen = []
    sb.convert(
        dense,
        batches,
        TREES["one level"],
        spec=sb.ConversionSpec(samples=40, norm_samples=10),
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    ends = {what: (done, total) for what, done, total in seen}
    assert ends == {
        "latents of level 0": (40, 40),
        "activations below level 0": (40, 40),
        "batch norms of level 1": (20, 20),
    }


def test_a_generator_is_refused_before_it_is_used_up(dense, batches):
    once = (batch for batch in batches)
    with pytest.raises(ConfigError, match="used up after one pass"):
        sb.convert(dense, once)
    assert len(list(once)) == 3


@pytest.mark.parametrize(
    ("loader", "error", "reason"),
    [
        ([], DataError, "empty"),
        ([{"image": torch.zeros(4, 1, 8, 8)}], DataError, "pair"),
        ([(torch.randn(1, 1, 8, 8), torch.zeros(1).long())], ConversionError, "1 calibration"),
        ([(torch.ones(9, 1, 8, 8), torch.zeros(9).long())], ConversionError, "distinct"),
    ],
    ids=["empty", "no pairs", "one sample", "identical samples"],
)
def test_data_that_cannot_be_clustered_is_refused(dense, loader, error, reason):
    with pytest.raises(error, match=reason):
        sb.convert(dense, loader, TREES["one level"])


@pytest.mark.parametrize("place", [0, 70])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_input_that_is_no_number_is_refused(dense, batches, value, place):
    x = images(batches)
    x[place, 0, 3, 3] = value
    loader = list(zip(x.split(32), [y for _, y in batches], strict=True))
    with pytest.raises(NumericError, match="NaN or infinite"):
        sb.convert(dense, loader, TREES["one level"])


# -- networks and trees --------------------------------------------------------------------------


def test_a_tree_wider_than_its_source_is_refused(dense, batches):
    with pytest.raises(ConfigError, match=r"level 1 is 33 channels wide.*only 32"):
        sb.convert(dense, batches, sb.TreeSpec(widths=(33, 48)))


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (sb.TreeSpec.balanced(4), "smaller depth"),
        (sb.TreeSpec(cuts=("layer3", "fc")), "cannot cut at 'fc'"),
        (sb.TreeSpec(cuts=("layer4", "layer3")), "order"),
    ],
    ids=["too deep", "no stage", "backwards"],
)
def test_a_tree_that_does_not_fit_the_network_is_refused(dense, batches, tree, reason):
    with pytest.raises(ConfigError, match=reason):
        sb.convert(dense, batches, tree)


def test_a_cut_behind_an_identity_shortcut_is_refused(batches):
    """Basic blocks of equal width and no stride hand the stem's channels through layer1."""
    net = ResNet(
        ResNetSpec(
            block="basic",
            layers=(1, 1, 1),
            planes=(8, 16, 16),
            strides=(1, 2, 2),
            stem="cifar",
            stem_width=8,
            in_channels=1,
            classes=5,
        )
    ).eval()
    tree = sb.TreeSpec(cuts=("layer1", "layer2"), entry="project")
    with pytest.raises(ConversionError, match="layer1 hands its input's channels through"):
        sb.convert(net, batches, tree)


def test_an_operation_that_cannot_be_followed_is_refused_by_name(dense, batches):
    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(x, dim=1).real

    model = copy.deepcopy(dense)
    model.layer3.add_module("odd", Spectrum())
    with pytest.raises(UnsupportedOperation, match=r"aten\.\w*fft\w*.*layer3\.odd"):
        sb.convert(model, batches)


def test_a_network_without_an_adapter_is_refused(batches):
    with pytest.raises(ConversionError, match=r"forward of Linear cannot be followed.*Backbone"):
        sb.convert(nn.Linear(3, 3), batches)


@pytest.mark.parametrize("left_out", ["bn1", "layer2"])
def test_a_backbone_that_is_not_its_parts_is_refused(dense, batches, left_out):
    fields = vars(as_backbone(dense))
    chain, stages = (
        tuple(name for name in fields[key] if name != left_out) for key in ("chain", "stages")
    )
    wrong = sb.Backbone(**{**fields, "chain": chain, "stages": stages})
    with pytest.raises(ConversionError, match="is not its parts in a row"):
        sb.convert(wrong, batches)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chain": ("conv1", "layer9")}, "'layer9', which ResNet lacks"),
        ({"head": ("classifier",)}, "'classifier', which ResNet lacks"),
        ({"stages": ("layer1", "fc")}, "'fc' is not in its chain"),
    ],
)
def test_a_backbone_that_names_what_is_not_there_is_refused(dense, change, reason):
    with pytest.raises(ConfigError, match=reason):
        sb.Backbone(**{**vars(as_backbone(dense)), **change})


def test_class_clusters_cannot_split_a_single_class(dense, batches):
    """Five classes make three levels of halves impossible."""
    with pytest.raises(ConversionError, match=r"one class only.*clusters=latents"):
        sb.convert(dense, batches, TREES["three levels"], spec=SPECS["classes"])


# -- relatives -----------------------------------------------------------------------------------


def test_a_blueprint_has_the_shapes_of_the_conversion(dense, batches, converted):
    plain = blueprint(dense, batches[0][0][:1], TREES["the paper's"])
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in converted.state_dict().items()}


def test_a_single_path_has_the_widths_of_the_tree_and_no_router(dense, batches, converted):
    path = single_path(dense, batches, TREES["the paper's"])
    routers = sum(p.numel() for p in converted.routers.parameters()) // 3
    leaf = converted.path((0, 0))
    without = sum(p.numel() for name, p in leaf.named_parameters() if "routers" not in name)
    assert routers
    assert sum(p.numel() for p in path.parameters()) == without
    assert path(batches[0][0]).shape == (32, 5)


def test_a_single_path_that_keeps_everything_is_the_dense_network(dense, batches):
    tree = everything(TREES["the paper's"], dense)
    path = single_path(dense, batches, tree, spec=sb.ConversionSpec(norm_samples=0))
    with torch.no_grad():
        x = images(batches)
        assert torch.allclose(path(x), dense(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [sb.convert, single_path])
def test_a_last_batch_of_one_sample_is_no_obstacle(dense, batches, build):
    """With 1x1 features a batch norm cannot learn from one sample."""
    x, y = images(batches)[:33], torch.cat([y for _, y in batches])[:33]
    loader = list(zip(x.split(32), y.split(32), strict=True))
    small = [(part[..., :1, :1].contiguous(), label) for part, label in loader]
    build(dense, small, TREES["one level"])


def test_single_samples_teach_batch_norms_as_one_batch_does(dense, batches):
    together = images(batches), torch.cat([y for _, y in batches])
    alone = list(zip(together[0].split(1), together[1].split(1), strict=True))
    first, second = (sb.convert(dense, data, TREES["one level"]) for data in (batches, alone))
    assert all(channels[0]["norm_reestimated"] for channels in second.record["nodes"].values())
    assert same_weights(first, second)


def test_samples_of_other_shapes_are_not_joined(dense, batches):
    x, y = batches[0]
    mixed = [(x[:5], y[:5]), (x[5:], y[5:]), (x[:9, :, 1:], y[:9]), (x[9:], y[9:])]
    found = [len(x) for x, _ in stream(mixed, 1000, torch.device("cpu"))]
    assert found == [32, 9, 23]


def test_a_frozen_networks_copies_learn_again_unless_some_were_frozen_on_purpose(dense, batches):
    frozen = copy.deepcopy(dense).requires_grad_(False)
    net = sb.convert(frozen, batches, TREES["one level"])
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    part = copy.deepcopy(dense)
    part.conv1.requires_grad_(False)
    net = sb.convert(part, batches, TREES["one level"])
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["trunk.conv1.weight"]


def test_a_tree_may_be_given_as_lists(dense, batches):
    net = sb.convert(dense, batches, sb.TreeSpec(leaves=[[0], [1]], cuts=["layer4"]))
    assert net.tree == sb.TreeSpec(leaves=((0,), (1,)), cuts=("layer4",))
