"""Channels that siblings share: one tensor, wherever it is trained, stored, counted or run."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

import sigmabranch as sb
from sigmabranch.backbones import ResNet, ResNetSpec, as_backbone
from sigmabranch.conversion import blueprint
from sigmabranch.deploy import Package, Runtime, pack
from sigmabranch.deploy.export import export_net
from sigmabranch.deploy.gpu_path import siblings_in_order
from sigmabranch.deploy.program import Program
from sigmabranch.deploy.simulate import path_steps, streamed_bytes
from sigmabranch.errors import ConfigError, ConversionError
from sigmabranch.measure import cost
from sigmabranch.shared import shared_tensors, with_shared
from sigmabranch.tree import TreeSpec, node_key

SPEC = sb.ConversionSpec(balanced=True, centred=True, norm_samples=32, restarts=2)
UNEVEN = ((0,), (1, 0), (1, 1))


@pytest.fixture(scope="module")
def x(batches) -> Tensor:
    return torch.cat([x for x, _ in batches])


@pytest.fixture(scope="module", params=["tied", "early", "uneven", "all", "delta"])
def net(request, dense, batches) -> sb.SigmaBranchNet:
    """Converted, and what is each sibling's own moved away from the others'."""
    fields = {
        "tied": {"tied": 0.5},
        "early": {"tied": 0.5, "decide_after": "layer1"},
        "uneven": {"tied": 0.3, "leaves": UNEVEN},
        "all": {"tied": 1.0},
        "delta": {"delta": 2},
    }[request.param]
    net = sb.convert(dense, batches, TreeSpec(projection_dim=8, **fields), spec=SPEC)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in (net.specializers, net.heads, net.shared):
            for parameter in part.parameters():
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return net


@pytest.fixture(scope="module")
def package(net, x, tmp_path_factory) -> Package:
    return pack(net, tmp_path_factory.mktemp("package"), x[:1])


def copied(net: sb.SigmaBranchNet) -> sb.SigmaBranchNet:
    """The same network with the shared tensors copied into each branch."""
    tree = net.tree
    return sb.SigmaBranchNet(
        tree=TreeSpec(leaves=tree.leaves, projection_dim=8, decide_after=tree.decide_after),
        trunk=net.trunk,
        specializers={node: clone(net.specializer(node)) for node in tree.specializers},
        routers={node: net.router(node) for node in tree.inner},
        heads={leaf: clone(net.head(leaf)) for leaf in tree.leaves},
        plans=net.plans,
        source=None,
        record=net.record,
    )


def clone(module: nn.Module) -> nn.Module:
    import copy

    return with_shared(copy.deepcopy(module))


def test_nothing_is_tied_unless_asked(dense, batches):
    plain = blueprint(dense, batches[0][0][:1], TreeSpec())
    assert not list(plain.shared.parameters())
    assert "tied" not in TreeSpec().to_dict()
    assert TreeSpec(tied=0.0).keys == ("root", "0", "1", "0-0", "0-1", "1-0", "1-1")
    assert TreeSpec.from_dict(TreeSpec(tied=0.5).to_dict()) == TreeSpec(tied=0.5)


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match=r"tree tied must lie in \[0, 1\]"):
        TreeSpec(tied=share)


def test_a_share_that_rounds_to_nothing_is_refused(dense, batches):
    with pytest.raises(ConversionError, match="nothing to share: raise it"):
        blueprint(dense, batches[0][0][:1], TreeSpec(tied=0.001))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"delta": -1}, "is a rank"), ({"delta": 2, "tied": 0.5}, "set one of them")],
)
def test_a_delta_that_is_none_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        TreeSpec(**fields)


def test_a_delta_as_large_as_its_layer_is_refused(dense, batches):
    with pytest.raises(ConversionError, match="nothing to share: lower it"):
        blueprint(dense, batches[0][0][:1], TreeSpec(delta=1000))


def test_a_budget_that_would_not_count_deltas_is_refused(dense, batches):
    with pytest.raises(ConfigError, match="does not count deltas"):
        sb.plan_budget(dense, batches[0][0][:1], "60%", TreeSpec(delta=2))


def test_a_delta_is_nothing_at_first(dense, batches, x):
    trees = (TreeSpec(projection_dim=8, **fields) for fields in ({"delta": 2}, {"tied": 1.0}))
    found, expected = (sb.convert(dense, batches, tree, spec=SPEC) for tree in trees)
    torch.testing.assert_close(found.soft(x).logits, expected.soft(x).logits)
    again = sb.convert(dense, batches, TreeSpec(projection_dim=8, delta=2), spec=SPEC)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), "drawn by the conversion's seed"


def test_four_leaves_with_deltas_are_hardly_larger_than_one_path(tmp_path):
    spec = ResNetSpec(
        layers=(1, 1, 1, 1),
        planes=(16, 32, 64, 64),
        strides=(1, 2, 2, 1),
        stem="cifar",
        stem_width=32,
        classes=20,
    )
    fields = {"leaves": ((0,), (1,), (2,), (3,)), "projection_dim": 16, "shares": (1.0,)}
    image, model = torch.zeros(1, 3, 16, 16), ResNet(spec)
    plain = blueprint(model, image, TreeSpec(entry="inner", **fields))
    net = blueprint(model, image, TreeSpec(entry="inner", delta=2, **fields))
    path = cost(plain, image)["net"]["bytes_per_path"]["fp32"]
    assert cost(net, image)["net"]["bytes_total"]["fp32"] <= 1.15 * path
    package = pack(net, tmp_path, image)
    stored = sum(node.weight_bytes for node in package.nodes.values())
    assert stored <= 1.15 * package.path_bytes("0")


def test_a_bad_share_ends_a_command_with_one_line(shell, tmp_path):
    done = shell.run("count", "digits-resnet", "--set", "tree.tied=2")
    assert done.code == 2
    assert "tree tied must lie in [0, 1], got 2.0" in done.err
    assert "Traceback" not in done.err


def test_with_all_channels_tied_siblings_are_equal(dense, batches, x):
    spec = sb.ConversionSpec(norm_samples=0, restarts=2)
    net = sb.convert(dense, batches, TreeSpec(projection_dim=8, tied=1.0), spec=spec)
    assert not list(net.specializers.parameters())
    logits_BLV = net.soft(x).logits
    torch.testing.assert_close(logits_BLV[:, 0::2], logits_BLV[:, 1::2])  # 0-0 and 0-1, …


def test_conversion_gives_the_masked_dense_network_whatever_is_tied(dense, batches, x):
    """Before any training it makes no difference how much is one tensor."""
    found = [
        sb.convert(dense, batches, TreeSpec(projection_dim=8, tied=tied), spec=SPEC).soft(x)
        for tied in (0.25, 0.5, 1.0)
    ]
    for other in found[1:]:
        torch.testing.assert_close(other.logits, found[0].logits, rtol=1e-4, atol=1e-5)


def test_it_says_what_the_same_network_says_with_copies(net, x):
    torch.testing.assert_close(copied(net).soft(x).logits, net.soft(x).logits)
    torch.testing.assert_close(copied(net).hard(x).logits, net.hard(x).logits)


def test_the_gradient_of_a_tied_tensor_is_the_sum_over_its_siblings(net, x):
    single = copied(net)
    for part in (net, single):
        part.zero_grad()
        part.soft(x).logits.square().mean().backward()
    for node in net.tree.sharing:
        for name, tensor in net.shared[node_key(node)].named_parameters():
            path, _, own = name.partition(".")
            of = single.head if path.startswith("head-") else single.specializer
            inside = path.removeprefix("head-").replace("-", ".")
            parts = [
                of(child).get_parameter(f"{inside}.shared.{own}")
                for child in net.tree.children(node)
            ]
            summed = torch.stack([part.grad for part in parts]).sum(0)
            torch.testing.assert_close(tensor.grad, summed, rtol=1e-3, atol=1e-5)
    net.zero_grad()


def test_every_parameter_is_there_once(net, x):
    by_node = net.node_parameters()
    counted = [id(p) for parameters in by_node.values() for p in parameters]
    assert sorted(counted) == sorted({id(p) for p in net.parameters()})
    counts = cost(net, x[:1])
    assert counts["net"]["total_params"] == sum(p.numel() for p in net.parameters())
    assert [row["node"] for row in counts["nodes"]] == list(net.tree.keys)
    assert sum(row["params"] for row in counts["nodes"]) == counts["net"]["total_params"]
    assert sum(row["macs"] for row in counts["nodes"]) == counts["net"]["soft_macs"]
    for leaf in net.tree.leaves:
        own = sum(p.numel() for p in net.path(leaf).parameters())
        assert counts["paths"][node_key(leaf)]["active_params"] == own


def test_a_path_costs_what_it_costs_without_ties(dense, batches):
    example = batches[0][0][:1]
    tied, plain = (cost(blueprint(dense, example, TreeSpec(tied=t)), example) for t in (0.5, 0.0))
    for name in ("active_params", "macs", "macs_flop_counter", "soft_macs"):
        assert tied["net"][name] == plain["net"][name]
    assert tied["net"]["total_params"] < plain["net"]["total_params"]


def test_what_is_shared_is_as_likely_as_its_parent(net, x):
    log_prob = net.node_log_prob(net.soft(x).log_prob)
    assert log_prob.keys() == set(net.tree.keys) == net.node_parameters().keys()
    torch.testing.assert_close(log_prob["shared"], log_prob["root"])


def test_it_is_saved_once_and_loaded(net, x, tmp_path):
    net.save(tmp_path)
    loaded = sb.load(tmp_path)
    assert torch.equal(loaded(x), net(x))
    assert loaded.shared["root"].state_dict().keys() == net.shared["root"].state_dict().keys()
    assert not [name for name in net.state_dict() if ".shared." in name]


def test_training_moves_what_is_shared(dense, batches):
    net = sb.convert(dense, batches, TreeSpec(projection_dim=8, tied=0.5), spec=SPEC)
    before = {name: p.clone() for name, p in net.named_parameters()}
    recipe = sb.FinetuneRecipe(epochs=1, lr=0.05, node_grad_scale=True)
    sb.finetune(net, batches, recipe, device="cpu")
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if name.startswith("shared.")} <= moved


@pytest.mark.parametrize("budget", [None, "least"])
@pytest.mark.parametrize("prefetch", [True, False])
def test_a_package_says_what_the_network_says_within_any_budget(net, package, x, budget, prefetch):
    program = Program(package)
    largest = max(
        sum(part.bytes for part in (segment, *program.needs.get(segment, ())))
        for segment in program.segments
    )
    with Runtime.open(
        package.folder, budget=largest if budget else None, prefetch=prefetch
    ) as runtime:
        for sample in x[:8]:
            expected = net.hard(sample[None])
            logits, leaf, _ = runtime.predict(sample)
            assert leaf == node_key(net.tree.leaves[int(expected.leaf)])
            torch.testing.assert_close(logits, expected.logits[0], rtol=1e-3, atol=1e-4)
        assert runtime.peak_bytes <= runtime.budget


def test_less_than_a_block_with_what_it_borrows_is_refused(net, package):
    program = Program(package)
    alone = max(segment.bytes for segment in program.segments)
    least = max(
        sum(part.bytes for part in (segment, *program.needs.get(segment, ())))
        for segment in program.segments
    )
    if least > alone:
        with pytest.raises(ConfigError, match=f"at least {least:,}"):
            Runtime.open(package.folder, budget=least - 1)


def test_what_is_shared_is_read_before_the_branch_is_known_and_never_in_vain(net, package, x):
    with Runtime.open(package.folder, prefetch=False) as runtime:
        for sample in x[:6]:
            runtime.forget()
            _, leaf, trace = runtime.predict(sample)
            keys = [entry.node for entry in trace.nodes if entry.node != leaf[:1] or not net.early]
            assert keys.index("shared") == keys.index("root") + 1
            assert trace.wasted_bytes == 0
            assert trace.bytes_read == package.path_bytes(leaf)
    order = [segment.node for segment in Program(package).reads(("root",))]
    assert order[-1] == "shared", "wanted while nobody knows which child comes"


def test_a_package_stores_it_once(net, package):
    assert tuple(package.nodes) == net.tree.keys
    stored = [
        tensor.name
        for key in ("0", "1")
        for block in package.nodes[key].blocks
        for tensor in block.tensors
    ]
    assert not [name for name in stored if ".shared." in name]
    assert package.nodes["shared"].blocks
    package.verify()


def test_simulated_reads_are_those_of_the_runtime(package, x):
    leaf = package.leaves[0]
    total = sum(step.bytes for step in path_steps(package, leaf, lambda _: 1e-3))
    assert total == package.path_bytes(leaf)
    everything = sum(node.weight_bytes for node in package.nodes.values())
    first, again = streamed_bytes(package, everything, [leaf, leaf])
    assert (first, again) == (package.path_bytes(leaf), 0)


def test_stretches_of_a_gpu_path_are_those_of_the_siblings(dense, batches, tmp_path):
    net = blueprint(dense, batches[0][0][:1], TreeSpec(tied=0.5))
    package = pack(net, tmp_path, batches[0][0][:1])
    levels = siblings_in_order(package, Program(package))
    assert {key for siblings in levels for key in siblings} == set(package.nodes) - {
        key for key in package.nodes if key.endswith("shared")
    }


@pytest.mark.parametrize("format", ["pt2", "onnx", "onnx-nodes"])
def test_exports_say_what_the_network_says(dense, batches, x, tmp_path, format):
    if format != "pt2" and find_spec("onnxruntime") is None:
        pytest.skip("needs the deploy extra")
    net = sb.convert(dense, batches, TreeSpec(projection_dim=8, tied=0.5), spec=SPEC)
    export_net(net, tmp_path / "out", x[:4], format=format)  # compares every leaf
    if format == "onnx":
        stored = (tmp_path / "out" / "tree.onnx.data").stat().st_size
        assert stored < 4 * sum(t.numel() for t in copied(net).state_dict().values())


def test_a_grouped_convolution_is_tied_by_whole_groups():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()),
        nn.Sequential(
            nn.Conv2d(8, 16, 1),
            nn.Conv2d(16, 16, 3, padding=1, groups=16),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        ),
        nn.Sequential(nn.Conv2d(16, 16, 1), nn.GroupNorm(1, 16), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()
    x = torch.randn(8, 1, 6, 6)
    loader = [(x, torch.arange(8) % 3)]
    tree = TreeSpec.balanced(1, projection_dim=4, tied=0.5, cuts=("1.0",), entry="inner")
    net = sb.convert(as_backbone(model, x[:1]), loader, tree, spec=SPEC)
    torch.testing.assert_close(copied(net).soft(x).logits, net.soft(x).logits)
    shared = net.shared["root"].state_dict()
    assert {name.partition(".")[0] for name in shared} >= {"1_0", "1_1", "1_2"}
    assert shared["1_1.weight"].shape == (4, 1, 3, 3)


def test_names_of_what_is_borrowed_are_those_in_the_module(net):
    child = clone(net.specializer((0,)))
    assert shared_tensors(child)
    assert shared_tensors(child) <= child.state_dict().keys()
