"""Packages: the stored network is the network, any reader opens it, and damage is refused."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from conftest import randomise
from sigmabranch.archive import sealed
from sigmabranch.backbones import (
    Backbone,
    GlobalAveragePool,
    PointNet2,
    PointNet2Spec,
    ResNet,
    ResNetSpec,
)
from sigmabranch.conversion import blueprint
from sigmabranch.deploy.blocks import folded_nodes
from sigmabranch.deploy.fold import fold, foldable
from sigmabranch.deploy.package import Package, pack
from sigmabranch.deploy.runtime import Runtime
from sigmabranch.deploy.storage import PAGE
from sigmabranch.errors import CheckpointError, ConfigError, ConversionError
from sigmabranch.tree import TreeSpec

EXAMPLE = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def net(dense):
    return randomise(blueprint(dense, torch.zeros(1, 1, 8, 8)))


@pytest.fixture(scope="module")
def packed(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("package")
    pack(net, folder, torch.randn(1, 1, 8, 8), usage={"0-0": 0.7}, notes={"task": "none"})
    return folder


@pytest.fixture
def folder(packed, tmp_path):
    """A copy to damage."""
    return shutil.copytree(packed, tmp_path / "package")


def test_every_node_has_a_file_that_a_plain_reader_opens(net, packed):
    package = Package(packed)
    assert list(package.nodes) == ["root", "0", "1", "0-0", "0-1", "1-0", "1-1"]
    for node in package.nodes.values():
        names = [n for block in node.blocks for t in block.tensors for n in [t.name]]
        tensors = load_file(packed / node.file)
        assert [name for name in tensors if not name.startswith("__pad__")] != []
        assert set(names) == {name for name in tensors if not name.startswith("__pad__")}


def test_blocks_are_pages_in_order_of_execution_and_tensors_start_on_cache_lines(packed):
    for node in Package(packed).nodes.values():
        size = (packed / node.file).stat().st_size
        end = node.blocks[0].offset
        assert end % PAGE == 0 and end >= PAGE
        for block in node.blocks:
            assert block.offset == end and block.bytes % PAGE == 0
            assert all(tensor.offset % 64 == 0 for tensor in block.tensors)
            end += block.bytes
        assert end == size == node.bytes


def test_stored_tensors_are_those_of_the_folded_network(net, packed):
    package = Package(packed)
    for node in folded_nodes(net):
        with open(packed / package.nodes[node.key].file, "rb") as file:
            data = bytearray(file.read())
        for block, stored in zip(node.blocks, package.nodes[node.key].blocks, strict=True):
            part = memoryview(data)[stored.offset : stored.offset + stored.bytes]
            found = stored.tensors_in(part)
            assert found.keys() == block.tensors().keys()
            for name, tensor in block.tensors().items():
                assert torch.equal(found[name], tensor), name


def test_usage_notes_and_shapes_are_kept(packed):
    package = Package(packed)
    assert package.usage == {"0-0": 0.7} and package.notes == {"task": "none"}
    assert package.input_shape == (1, 8, 8) and package.classes == 5
    assert package.leaves == ("0-0", "0-1", "1-0", "1-1")


def test_path_bytes_are_those_of_the_nodes_on_the_path(packed):
    package = Package(packed)
    nodes = (package.nodes[key] for key in ("root", "1", "1-0"))
    assert package.path_bytes("1-0") == sum(node.bytes - node.blocks[0].offset for node in nodes)


def test_no_batch_norm_of_a_resnet_is_left(net):
    for node in folded_nodes(net):
        for block in node.blocks:
            assert not any(isinstance(part, nn.BatchNorm2d) for part in block.module.modules())


def test_packing_leaves_the_network_alone(net, tmp_path):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    pack(net, tmp_path, torch.randn(1, 1, 8, 8))
    assert before.keys() == net.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("model", ["resnet", "pointnet2"])
def test_dense_networks_of_every_family_fit_their_packages(model, tmp_path):
    dense, example = {
        "resnet": lambda: (
            ResNet(ResNetSpec(layers=(1, 1), planes=(2, 3), strides=(1, 2), block="basic")),
            torch.randn(1, 3, 32, 32),
        ),
        "pointnet2": lambda: (
            PointNet2(
                PointNet2Spec(
                    widths=((4, 4), (4, 6), (6, 8)),
                    centroids=(8, 4),
                    radii=(0.4, 0.8),
                    neighbours=(4, 4),
                    connected=(8, 6),
                )
            ),
            torch.randn(1, 16, 3) / 4,
        ),
    }[model]()
    package = pack(randomise(dense), tmp_path, example)
    assert package.leaves == ("root",)
    assert [node.key for node in package.skeleton()] == ["root"]


class Moody(nn.Module):
    """A network that looks at its input before it decides what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        y = self.conv(x).mean((2, 3))
        return self.fc(y) if x.sum() > 0 else self.fc(-y)


def test_a_network_that_is_no_row_of_modules_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="forward of Moody cannot be followed"):
        pack(Moody(), tmp_path, torch.randn(1, 3, 32, 32))
    assert not list(tmp_path.iterdir())


class Twice(nn.Module):
    """A convolution whose output is read by its norm and by somebody else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Hostile(nn.Module):
    """Python that no trace can follow, around a part that one can."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, pair):
        first, second = pair
        return self.inside(first if first.sum() > 0 else second)


def test_a_norm_is_folded_only_where_it_alone_reads_the_convolution():
    assert foldable(Twice()) == []
    assert (
        foldable(nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)))
        == []
    )
    shared = nn.Conv2d(2, 2, 1)
    assert foldable(nn.Sequential(shared, nn.BatchNorm2d(2), shared)) == []


def test_folding_reaches_into_modules_that_cannot_be_traced_as_a_whole():
    module = Hostile().eval()
    nn.init.normal_(module.inside[1].running_mean)
    x = torch.ones(1, 2, 3, 3)
    expected = module((x, x))
    pairs = foldable(module)
    assert pairs == [("inside.0", "inside.1")]
    fold(module, pairs)
    torch.testing.assert_close(module((x, x)), expected)


def test_linear_layers_fold_too():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    nn.init.normal_(module[1].running_mean)
    x = torch.randn(5, 3)
    expected = module(x)
    fold(module, foldable(module))
    torch.testing.assert_close(module(x), expected)


def test_a_flipped_byte_anywhere_is_refused(folder):
    for name in ("0-1.safetensors", "root.safetensors", "manifest.json"):
        path = folder / name
        whole = bytearray(path.read_bytes())
        for position in (9, len(whole) // 2, len(whole) - 3):
            whole[position] ^= 1
            path.write_bytes(whole)
            with pytest.raises(CheckpointError, match=r"damaged|schema|belongs"):
                Package(folder).verify()
            whole[position] ^= 1
        path.write_bytes(whole)
    Package(folder).verify()


def test_missing_truncated_and_foreign_files_are_refused(folder, dense, tmp_path):
    (folder / "1.safetensors").rename(folder / "away")
    with pytest.raises(CheckpointError, match=r"1\.safetensors is missing: copy"):
        Package(folder)
    (folder / "away").rename(folder / "1.safetensors")
    with open(folder / "1.safetensors", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match="5000 bytes instead of"):
        Package(folder)
    with pytest.raises(CheckpointError, match="holds no package"):
        Package(tmp_path / "nowhere")


def rewritten(folder, change):
    """The manifest with a change and a hash that fits it, as a tamperer would write it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))


def refused(load, *arguments) -> str:
    """The message of the one-line :class:`CheckpointError` that loading ends with."""
    with pytest.raises(CheckpointError) as caught:
        load(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def swap_names(manifest):
    """The names of a body's block and of the router after it."""
    first, *_, last = manifest["nodes"][1]["blocks"]
    first["name"], last["name"] = last["name"], first["name"]


def first_tensor(manifest):
    return manifest["nodes"][1]["blocks"][0]["tensors"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["nodes"][1].update(file=5), "node file must be str, got 5"),
        (lambda m: m["nodes"][1].update(bytes="9"), "node bytes must be int"),
        (lambda m: m["nodes"][1].update(owner="me"), "unknown node key 'owner'"),
        (lambda m: m["nodes"][1].update(blocks=[]), "node 0 has no such blocks"),
        (lambda m: m["nodes"][1].update(decides_after=-1), "node 0 has no such blocks"),
        (lambda m: m["nodes"][1]["blocks"][0].update(crc32=None), "block crc32 must be int"),
        (lambda m: m["nodes"][1]["blocks"][0].update(bytes=2.5), "block bytes must be int"),
        (lambda m: m["nodes"][1]["blocks"][0].update(macs=-1), "-1 multiply-adds"),
        (lambda m: m["nodes"][1]["blocks"].reverse(), "the blocks of node 0 are not its file"),
        (lambda m: m["nodes"][1]["blocks"].pop(), "the blocks of node 0 are not its file"),
        (lambda m: m["nodes"].append({**m["nodes"][-1], "key": "2"}), "not those of its tree"),
        (lambda m: m["nodes"].pop(), "not those of its tree"),
        (lambda m: m["nodes"].append(m["nodes"][-1]), "not those of its tree"),
        (lambda m: m["network"].pop("tree"), "damaged: KeyError"),
        (lambda m: m.update(network=[]), "network must be dict"),
        (lambda m: m.update(usage=[0.5]), "usage must be dict"),
        (lambda m: m.update(class_share=[[1.0]]), "class share must be a table of"),
        (lambda m: m.update(class_share=7), "not iterable"),
        (lambda m: m.update(usage={"0-0": "often"}), "must be a share of inputs, got 'often'"),
        (lambda m: m.update(usage={"0-0": -1}), "must be a share of inputs, got -1"),
        (lambda m: m.update(usage={"0": 1.0}), "usage names '0': the leaves are 0-0, 0-1"),
        (lambda m: m.update(notes="none"), "notes must be dict"),
        (lambda m: m.update(classes=None), "classes must be int"),
        (lambda m: m.update(input="188"), "input must be list"),
        (lambda m: m.update(input=[1, -8, 8]), r"cannot be of shape \[1, -8, 8\]"),
        (lambda m: m["nodes"][1].update(file="../0.safetensors"), "outside its own folder"),
        (lambda m: m["nodes"][1].update(file="/etc/passwd"), "outside its own folder"),
        (lambda m: m["nodes"][1]["blocks"][0].update(offset=100), "does not lie on pages"),
        (lambda m: m["nodes"][1]["blocks"][0]["tensors"][0].update(offset=1 << 30), "lie in block"),
        (lambda m: m["nodes"][1]["blocks"][0]["tensors"][1].update(shape=[-1]), "lie in block"),
        (lambda m: m["nodes"][1]["blocks"][0]["tensors"][0].update(dtype="F7"), "no known form"),
        (lambda m: m["nodes"][1]["blocks"][-1].update(bytes=1 << 20), "of node 0 are not its file"),
        (lambda m: m.pop("input"), "damaged"),
        (lambda m: m.update(schema=99), "schema 99"),
        (lambda m: m.update(nodes=7), "damaged"),
    ],
)
def test_a_manifest_that_asks_for_the_impossible_is_refused(folder, change, message):
    rewritten(folder, change)
    assert re.search(message, refused(Package, folder))


@pytest.mark.parametrize(
    "text",
    ['{"format": NaN}', '{"a": Infinity}', '{"a":' * 50_000, '{"a":' * 900 + "1" + "}" * 900],
)
def test_a_manifest_that_nobody_writes_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    assert re.search("damaged|belongs to no package", refused(Package, folder))
    whole = {"format": "sigmabranch-package", "schema": 1, "notes": 0}
    (folder / "manifest.json").write_text(json.dumps(whole).replace("0", text, 1))
    assert "damaged" in refused(Package, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["nodes"][0].update(decides_after=0), "node root .* is not that of"),
        (lambda m: m["nodes"][1].update(decides_after=0), "node 0 .* is not that of"),
        (swap_names, "block .* of node 0 .* is of another shape"),
        (lambda m: first_tensor(m).update(dtype="I32"), "is of another shape"),
    ],
)
def test_a_package_that_would_run_otherwise_than_its_network_is_refused(folder, change, message):
    rewritten(folder, change)
    assert re.search(message, refused(Package(folder).skeleton))


def test_a_package_of_another_network_does_not_fit(folder):
    def narrower(manifest):
        tensors = manifest["nodes"][3]["blocks"][0]["tensors"]
        tensors[0]["shape"][0] -= 1

    rewritten(folder, narrower)
    with pytest.raises(CheckpointError, match="another shape"):
        Package(folder).skeleton()


def test_packing_again_replaces_the_package(net, folder):
    pack(net, folder, torch.randn(1, 1, 8, 8), usage={"1-1": 1.0})
    package = Package(folder)
    package.verify()
    assert package.usage == {"1-1": 1.0}
    assert not list(folder.glob(".*"))


def test_packing_never_replaces_a_saved_network(net, tmp_path):
    net.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "would be lost: choose another folder" in refused(pack, net, tmp_path, EXAMPLE)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "text", ["{", '{"format": "sigmabranch-package", "schema": 9}', '{"name": "a web page"}']
)
def test_packing_replaces_no_manifest_that_it_cannot_read(net, folder, text):
    (folder / "manifest.json").write_text(text)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "would be lost" in refused(pack, net, folder, EXAMPLE)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_packing_replaces_no_file_that_no_package_has(net, tmp_path):
    (tmp_path / "root.safetensors").write_text("mine")
    assert "root.safetensors is damaged, or was not" in refused(pack, net, tmp_path, EXAMPLE)
    assert [path.name for path in tmp_path.iterdir()] == ["root.safetensors"]


def test_operations_are_those_of_one_input_whatever_the_example(net, packed, tmp_path):
    package = pack(net, tmp_path, torch.randn(8, 1, 8, 8))
    for key, node in Package(packed).nodes.items():
        assert [b.macs for b in package.nodes[key].blocks] == [b.macs for b in node.blocks]


@pytest.mark.parametrize(
    ("usage", "message"),
    [
        ({"0": 1.0}, "usage names '0': the leaves are 0-0, 0-1, 1-0, 1-1"),
        ({"0-0": -0.1}, "must be a share of inputs, got -0.1"),
        ({"0-0": float("nan")}, "must be a share of inputs, got nan"),
        ({"0-0": float("inf")}, "must be a share of inputs, got inf"),
    ],
)
def test_a_usage_that_is_none_is_refused(net, tmp_path, usage, message):
    with pytest.raises(ConfigError, match=message):
        pack(net, tmp_path, EXAMPLE, usage=usage)
    assert not list(tmp_path.iterdir())


class Alike(nn.Module):
    """Modules whose paths differ in nothing but a dot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU())
        self.conv_0 = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.conv_0(self.conv(x)).mean((2, 3)))


def test_modules_whose_stored_names_would_be_the_same_are_refused(tmp_path):
    backbone = Backbone(
        model=Alike().eval(),
        chain=("conv", "conv_0"),
        stages=("conv_0",),
        pool=GlobalAveragePool(),
        head=("fc",),
    )
    with pytest.raises(ConversionError, match=r"conv\.0 and conv_0 under the same name: rename"):
        pack(backbone, tmp_path, EXAMPLE)
    assert not list(tmp_path.iterdir())


class Repeating(nn.Module):
    """One activation at two places of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        relu = nn.ReLU()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 1), relu, nn.Conv2d(4, 4, 1), relu)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


def test_a_module_that_is_used_twice_runs_twice(tmp_path):
    torch.manual_seed(0)
    model = Repeating().eval()
    backbone = Backbone(
        model=model, chain=("conv",), stages=(), pool=GlobalAveragePool(), head=("fc",)
    )
    pack(backbone, tmp_path, EXAMPLE)
    with Runtime.open(tmp_path, skeleton=backbone) as runtime:
        assert torch.allclose(runtime(EXAMPLE), model(EXAMPLE), atol=1e-6)


def test_an_unbalanced_tree_packs(dense, tmp_path):
    tree = TreeSpec(leaves=((0,), (1, 0), (1, 1)))
    net = randomise(blueprint(dense, torch.zeros(1, 1, 8, 8), tree))
    package = pack(net, tmp_path, torch.randn(1, 1, 8, 8))
    assert package.leaves == ("0", "1-0", "1-1")


def test_headers_are_plain_safetensors_metadata(packed):
    with safe_open(packed / "0.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
