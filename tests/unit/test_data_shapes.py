"""The procedural point clouds, and what every data set's inputs look like."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sigmabranch.data import DATA_NAMES, Dataset, ResidentSplit, input_shape, open_data, shapes
from sigmabranch.data.imagenet import IMAGE_SIZE
from sigmabranch.errors import ConfigError
from sigmabranch.points import in_farthest_order


@pytest.fixture(scope="module")
def small() -> Dataset:
    """The first few clouds of each class."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "TRAIN_CLOUDS", 4)
        patch.setattr(shapes, "TEST_CLOUDS", 2)
        return open_data("shapes")


def inputs(data: Dataset) -> torch.Tensor:
    assert isinstance(data.train, ResidentSplit)
    assert isinstance(data.test, ResidentSplit)
    return torch.cat([data.train.inputs, data.test.inputs])


def test_shapes_need_no_folder_and_hold_every_class_equally_often(small: Dataset) -> None:
    assert (small.name, small.classes, small.shape) == ("shapes", 12, (1024, 3))
    assert small.train.labels.bincount().tolist() == [4] * 12
    assert small.test.labels.bincount().tolist() == [2] * 12


def test_shapes_are_normalised_ordered_and_all_different(small: Dataset) -> None:
    clouds = inputs(small)
    assert clouds.shape == (72, 1024, 3)
    assert clouds.dtype == torch.float32
    assert clouds.mean(1).abs().max() < 1e-6
    assert (clouds.norm(dim=2).amax(1) - 1).abs().max() < 1e-6
    assert in_farthest_order(clouds[::6], 512)
    assert len(clouds[:, 0].unique(dim=0)) == 72


def test_shapes_are_the_same_every_time() -> None:
    # A change here would alter what every network of shapes has learned.
    cloud = shapes.sample_cloud(shapes.SOLIDS["torus"], 7)
    assert np.array_equal(cloud, shapes.sample_cloud(shapes.SOLIDS["torus"], 7))
    assert not np.allclose(cloud, shapes.sample_cloud(shapes.SOLIDS["torus"], 8))
    assert cloud[0].tolist() == pytest.approx([0.22064564, -0.7922771, -0.22235958], abs=1e-6)


def area(solid: shapes.Solid) -> float:
    corners = np.concatenate([shapes.triangles(grid) for grid in solid])
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)


def test_solids_have_the_area_that_geometry_says() -> None:
    ball = shapes.revolve(shapes.arc(-1, 1))
    ring = shapes.revolve(np.array([1, 0]) + shapes.arc(0, 4, 0.3))
    can = shapes.revolve([(0, -1), (1, -1), (1, 1), (0, 1)])
    cube = shapes.revolve([(0, -1), (1, -1), (1, 1), (0, 1)], sides=4)
    assert area([ball]) == pytest.approx(4 * math.pi, rel=0.01)
    assert area([ring]) == pytest.approx(4 * math.pi**2 * 0.3, rel=0.01)
    assert area([can]) == pytest.approx(6 * math.pi, rel=0.01)
    side = math.sqrt(2)
    assert area([cube]) == pytest.approx(2 * side**2 + 4 * side * 2)
    assert np.abs(cube).max((0, 1)) == pytest.approx([side / 2, side / 2, 1])


def test_points_lie_on_the_surface_evenly_by_area() -> None:
    # A tall thin box: the share of points on each face is the face's share of the area.
    box = shapes.revolve([(0, -1), (1, -1), (1, 1), (0, 1)], sides=4) * (math.sqrt(2), 0.1, 1)
    x, y, z = shapes.sample_surface(shapes.triangles(box), 20_000, np.random.default_rng(0)).T
    half = 0.1 / math.sqrt(2)
    faces = {
        "ends": (np.abs(np.abs(z) - 1) < 1e-9, 2 * half),
        "broad": (np.abs(np.abs(y) - half) < 1e-9, 2),
        "narrow": (np.abs(np.abs(x) - 1) < 1e-9, 2 * half),
    }
    assert np.any([on for on, _ in faces.values()], axis=0).all()
    total = sum(size for _, size in faces.values())
    for on, size in faces.values():
        assert on.mean() == pytest.approx(size / total, abs=0.01)
    broad = faces["broad"][0]
    for along in (x[broad], z[broad]):
        assert np.histogram(along, 10, (-1, 1))[0] == pytest.approx(broad.sum() / 10, rel=0.1)


def test_poses_are_rotations_by_any_angle_about_the_vertical_and_a_small_tilt() -> None:
    rng = np.random.default_rng(1)
    poses = np.stack([shapes.random_pose(rng) for _ in range(300)])
    assert poses @ poses.transpose(0, 2, 1) == pytest.approx(
        np.broadcast_to(np.eye(3), (300, 3, 3))
    )
    assert np.linalg.det(poses) == pytest.approx(np.ones(300))
    tilt = np.degrees(np.arccos(poses[:, 2, 2]))
    assert 13 < tilt.max() <= 15
    heading = np.arctan2(poses[:, 1, 0], poses[:, 0, 0])
    assert np.histogram(heading, 4, (-math.pi, math.pi))[0].min() > 45


def test_an_angle_has_the_surface_of_an_extruded_l() -> None:
    walls, *caps = shapes.SOLIDS["angle"](np.random.default_rng(3))
    x, y, z = np.moveaxis(walls, 2, 0)
    (_, stem, width), (_, foot, height) = np.unique(x), np.unique(z)
    section = foot * width + stem * (height - foot)
    assert area(caps) == pytest.approx(2 * section)
    assert area([walls]) == pytest.approx(2 * (width + height) * np.ptp(y))


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_input_shape_is_that_of_the_opened_data(name: str, small: Dataset) -> None:
    data = small if name == "shapes" else open_data(name)
    (x, _) = next(data.test.batches(torch.arange(2), 2))
    assert input_shape(name) == data.shape == tuple(x.shape[1:])


def test_input_shape_knows_every_data_set_and_its_sizes() -> None:
    shape = {name: input_shape(name) for name in DATA_NAMES}
    assert shape["cifar100"] == input_shape("cifar100", 32) == (3, 32, 32)
    assert shape["imagenet"] == (3, IMAGE_SIZE, IMAGE_SIZE)
    assert input_shape("imagenet", 160) == (3, 160, 160)
    assert shape["modelnet40"] == shape["shapes"] == (1024, 3)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("shapes", 1024, "no image_size"),
        ("cifar100", 64, "32 x 32"),
        ("imagenet", 0, "1 or more"),
        ("shape", None, "did you mean shapes"),
    ],
)
def test_sizes_and_names_that_do_not_exist_are_refused(
    name: str, size: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        input_shape(name, size)
