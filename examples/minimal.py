"""Branch a network of your own: a small CNN that reads handwritten digits.

    pip install 'sigma-branch[train,measure,data]'
    python examples/minimal.py

Three things are yours to say: the network, where it may be cut, and the data. The rest is four
calls: train, convert, finetune, evaluate. Under a minute on one CPU core.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sigmabranch as sb


def layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Digits(nn.Module):
    """An ordinary PyTorch module; nothing in it knows of branches."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = layer(1, 32)
        self.strokes = layer(32, 64, stride=2)
        self.shapes = nn.Sequential(layer(64, 96), layer(96, 96))
        self.digits = nn.Sequential(layer(96, 128, stride=2), layer(128, 128))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.scores = nn.Linear(128, 10)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, 8, 8) → (B, 10)."""
        feature = self.digits(self.shapes(self.strokes(self.edges(image))))
        return self.scores(self.pool(feature).flatten(1))


def where_to_cut(model: Digits) -> sb.Backbone:
    """The network as a chain of its modules, and the links at which branches may begin.

    With a tree of two levels, the last two stages are split and the rest is the shared trunk.
    """
    return sb.Backbone(
        model=model,
        chain=("edges", "strokes", "shapes", "digits"),
        stages=("strokes", "shapes", "digits"),
        head=("scores",),
    )


def load_data() -> tuple[DataLoader, DataLoader]:
    """Training and test batches of scikit-learn's 1,797 digits, 8×8 pixels each."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        range(len(labels)), test_size=500, stratify=digits.target, random_state=0
    )
    return (
        DataLoader(TensorDataset(images[train], labels[train]), batch_size=64, shuffle=True),
        DataLoader(TensorDataset(images[test], labels[test]), batch_size=250),
    )


def main(epochs: int, folder: Path) -> None:
    """Train, branch, fine-tune, compare, save and load."""
    torch.manual_seed(0)
    train, test = load_data()
    model = Digits()
    shape = {"batch_size": 64, "warmup_epochs": 1, "label_smoothing": 0.0}
    sb.train(model, train, sb.Recipe(epochs=epochs, lr=0.1, **shape), folder=folder / "dense")
    dense = sb.evaluate_dense(model, test)

    backbone = where_to_cut(model)
    tree = sb.TreeSpec(projection_dim=16)  # two levels, four leaves
    net = sb.convert(backbone, train, tree, spec=sb.ConversionSpec(centred=True, balanced=True))
    # Sharp routing from the start, kept sharp and even: see docs/method.md.
    recipe = sb.FinetuneRecipe(
        epochs=epochs, lr=0.05, node_grad_scale=True, resp_prior=True, balance_weight=0.3, **shape
    )
    sb.finetune(net, train, recipe, folder=folder / "branched")
    branched = sb.evaluate(net, test)

    cost = sb.count(net, next(iter(test))[0], dense=model)
    stored, active = cost["dense"]["params"], cost["net"]["active_params"]
    print(f"dense     {dense['top1']:5.1f} %  {stored:>9,} parameters, all active")
    print(f"branched  {branched['top1']:5.1f} %  {active:>9,} active per input")
    print(f"          {cost['reduction_percent']['active_params']:.0f} % fewer active parameters")
    print("samples per leaf:", ", ".join(f"{share:.0%}" for share in branched["usage"]))

    net.save(folder / "net")  # safetensors and JSON, no pickle
    same = sb.load(folder / "net", skeleton=where_to_cut(Digits()))
    image = next(iter(test))[0][:1]
    print("one image:", same(image).argmax().item(), "by leaf", same.hard(image).leaf.item())


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--epochs", type=int, default=8, help="of each of the two trainings")
    with TemporaryDirectory() as folder:
        main(options.parse_args().epochs, Path(folder))
