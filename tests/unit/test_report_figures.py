import subprocess
import sys

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from matplotlib.patches import FancyBboxPatch, PathPatch  # noqa: E402

from sigmabranch.errors import CheckpointError, ConfigError  # noqa: E402
from sigmabranch.report.figures import (  # noqa: E402
    channel_partition,
    class_leaf_map,
    save_figure,
    training_curves,
    tree_figure,
)

RECORD = {
    "splits": {
        "root": {"sizes": [30, 10], "channel_mean": {"layer3": [[5, 4, 3, 0, 1], [5, 1, 3, 2, 1]]}},
        "0": {"sizes": [15, 15], "channel_mean": {"layer4": [[-1, 2.5, 0], [0.5, 2, -3]]}},
        "1": {"sizes": [0, 10], "channel_mean": {}},
    },
    "nodes": {
        "0": [{"stage": "layer3", "shared": [0], "specific": [1, 2], "kept": [0, 1, 2]}],
        "1": [{"stage": "layer3", "shared": [0], "specific": [2, 3], "kept": [0, 2, 3]}],
        "0-0": [{"stage": "layer4", "shared": [1], "specific": [], "kept": [1]}],
        "0-1": [{"stage": "layer4", "shared": [1], "specific": [0], "kept": [0, 1]}],
    },
}


def points(axes):
    return {
        group.get_label(): {tuple(point) for point in group.get_offsets().tolist()}
        for group in axes.collections
    }


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_every_channel_is_drawn_once_in_the_colour_of_its_holder():
    first, second = channel_partition(RECORD).axes[:2]
    assert points(first) == {
        "dropped": {(1, 1)},
        "shared by choice": {(5, 5)},
        "branch 0 only": {(4, 1)},
        "branch 1 only": {(0, 2)},
        "picked by both": {(3, 3)},
    }
    assert points(second)["branch 1 only"] == {(-1, 0.5)}
    assert points(second)["dropped"] == {(0, -3)}


def test_of_three_clusters_the_smallest_and_the_largest_mean_are_drawn():
    kept = ([0, 1], [0, 2], [0, 2, 3])
    record = {
        "splits": {
            "root": {
                "sizes": [3, 2, 1],
                "channel_mean": {"s": [[5, 4, 0, 1, 2], [6, 1, 3, 0, 2], [7, 0, 2, 3, 2]]},
            },
            "2": {"sizes": [1, 0], "channel_mean": {"s": [[1], [0]]}},
        },
        "nodes": {
            **{
                str(branch): [{"stage": "s", "shared": [0], "specific": own[1:], "kept": own}]
                for branch, own in enumerate(kept)
            },
            **{
                f"2-{branch}": [{"stage": "s", "shared": [], "specific": [0], "kept": [0]}]
                for branch in (0, 1)
            },
        },
    }
    figure = channel_partition(record)
    first = figure.axes[0]
    assert points(first) == {
        "dropped": {(2, 2)},
        "shared by choice": {(5, 7)},
        "branch 0 only": {(0, 4)},
        "branch 1 only": set(),
        "branch 2 only": {(0, 3)},
        "picked by several": {(0, 3)},
    }
    assert texts(first) == ["5 channels · clusters 50% / 33% / 17%"]
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(named) == len({*named})
    assert {"branch 2 only", "picked by several", "picked by both"} <= {*named}


def test_root_axes_are_only_used_for_activations_that_are_never_negative():
    first, second = channel_partition(RECORD).axes[:2]
    assert first.get_xscale() == "function"
    assert second.get_xscale() == "linear"
    assert second.get_xlim()[0] <= -3


def test_a_dead_stage_is_drawn_too():
    record = {
        "splits": {"root": {"sizes": [1, 1], "channel_mean": {"s": [[0.0, 0.0], [0.0, 0.0]]}}},
        "nodes": {
            key: [{"stage": "s", "shared": [0], "specific": [], "kept": [0]}] for key in ("0", "1")
        },
    }
    figure = channel_partition(record)
    figure.canvas.draw()
    assert points(figure.axes[0])["shared by choice"] == {(0, 0)}


def test_a_record_without_channel_means_is_refused():
    bare = {"splits": {"root": {"channel_mean": {}}}, "nodes": {}}
    with pytest.raises(ConfigError, match="no channel means"):
        channel_partition(bare)


def evaluation(share):
    share = np.asarray(share)
    leaves = [f"{number:02b}"[0] + "-" + f"{number:02b}"[1] for number in range(share.shape[1])]
    return {
        "class_leaf_share": share.tolist(),
        "usage": share.mean(axis=0).tolist(),
        "leaves": leaves,
    }


def test_names_of_classes_are_shown_as_they_are():
    names = ["x$\\foo$", "a$b$"]
    figure = class_leaf_map(evaluation([[0.2, 0.8], [0.6, 0.4]]), names)
    figure.canvas.draw()  # which would stumble over formulas
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert sorted(shown) == sorted(names)


def test_classes_are_grouped_by_main_leaf_and_sorted_by_share_within():
    share = [[0.2, 0.8], [0.6, 0.4], [0.0, 1.0], [0.9, 0.1]]
    axes = class_leaf_map(evaluation(share), ["ant", "bee", "cow", "dog"]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dog", "bee", "cow", "ant"]
    assert axes.get_images()[0].get_array()[:, :, 3].tolist() == [
        [0.9, 0.1],
        [0.6, 0.4],
        [0.0, 1.0],
        [0.2, 0.8],
    ]
    assert texts(axes) == ["90%", "10%", "60%", "40%", "100%", "20%", "80%"]


def test_a_hundred_classes_are_all_named_in_blocks():
    share = np.random.default_rng(0).dirichlet([0.4] * 4, 100)
    figure = class_leaf_map(evaluation(share))
    names = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert sorted(map(int, names)) == list(range(100))
    assert len(figure.axes) == 4


def test_a_thousand_classes_are_grouped_and_counted_instead():
    share = np.random.default_rng(0).dirichlet([0.4] * 4, 1000)
    axes = class_leaf_map(evaluation(share)).axes[0]
    groups = [int(text.split("\n")[0]) for text in texts(axes) if text.endswith("\nclasses")]
    assert groups == np.bincount(share.argmax(axis=1)).tolist()
    assert not axes.get_yticklabels()


def test_a_group_without_room_for_a_line_of_text_gets_none():
    share = np.zeros((1000, 2))
    share[:, 0] = 1
    share[:5] = [0, 1]
    axes = class_leaf_map(evaluation(share)).axes[0]
    assert [text for text in texts(axes) if text.endswith("\nclasses")] == ["995\nclasses"]


def test_curves_follow_the_dense_epochs_and_skip_rows_without_a_value():
    dense = [{"epoch": 1, "loss": 2.0, "top1": 10.0}, {"epoch": 2, "loss": 1.0, "top1": None}]
    finetune = [{"epoch": 1, "loss": 0.5, "routing_gain": 3.0}, {"epoch": 2, "loss": 0.4}]
    loss, accuracy, _, gain = training_curves(dense, finetune, leaves=4, dense_top1=50.0).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert lines["dense"] == [[1, 2.0], [2, 1.0]]
    assert lines["branched, total"] == [[3, 0.5], [4, 0.4]]
    assert accuracy.lines[0].get_xydata().tolist() == [[1, 10.0]]
    assert gain.lines[0].get_xydata().tolist() == [[3, 3.0]]
    assert texts(accuracy) == ["dense 50.00%"]


def test_curves_of_a_fine_tuning_alone_start_at_its_own_first_epoch():
    figure = training_curves([], [{"epoch": 1, "loss": 0.5}], leaves=2)
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 0.5]]


def cost(keys):
    return {
        "nodes": [{"node": key, "width": 64, "params": 1234, "macs": 1} for key in keys],
        "net": {"active_params": 10, "total_params": 20},
    }


UNEVEN = ("root", "0", "1", "1-0", "1-1")


def test_bands_are_as_thick_as_their_share_of_the_inputs():
    usage = {"0": 0.5, "1-0": 0.4, "1-1": 0.1}
    axes = tree_figure(cost(UNEVEN), usage).axes[0]
    bands = [patch for patch in axes.patches if isinstance(patch, PathPatch)]
    thickness = [band.get_path().vertices[3][1] - band.get_path().vertices[4][1] for band in bands]
    assert np.allclose(np.array(thickness) / thickness[0], [1, 1, 0.8, 0.2])
    assert [text for text in texts(axes) if "%" in text] == ["100%", "50%", "50%", "40%", "10%"]


def test_unmeasured_bands_are_equal_parts_of_what_arrives():
    keys = ("root", "0", "1", "2", "2-0", "2-1")
    axes = tree_figure(cost(keys), None).axes[0]
    bands = [patch for patch in axes.patches if isinstance(patch, PathPatch)]
    thickness = [band.get_path().vertices[3][1] - band.get_path().vertices[4][1] for band in bands]
    assert np.allclose(np.array(thickness) / thickness[0], [1, 1, 1, 0.5, 0.5])


def test_a_leaf_above_the_last_level_reaches_through_the_columns_below():
    axes = tree_figure(cost(UNEVEN), None).axes[0]
    boxes = [patch for patch in axes.patches if isinstance(patch, FancyBboxPatch)][::2]
    right = [box.get_x() + box.get_width() for box in boxes]
    assert right[1] == right[3] == right[4] > right[2] > right[0]
    assert texts(axes).count("1.23 k params") == 5


def test_a_deep_tree_keeps_its_boxes_apart():
    keys = ["root", *("-".join(f"{n:0{d}b}") for d in range(1, 6) for n in range(2**d))]
    figure = tree_figure(cost(keys), None)
    boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)][::2]
    extents = [(b.get_x(), b.get_y(), b.get_width(), b.get_height()) for b in boxes]
    assert len(extents) == 63
    for number, (x, y, w, h) in enumerate(extents):
        for u, v, s, t in extents[:number]:
            assert x >= u + s or u >= x + w or y >= v + t or v >= y + h


def test_a_figure_is_written_with_the_same_bytes_twice_and_leaves_settings_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    for folder in ("a", "b"):
        paths = save_figure(
            training_curves([{"epoch": 1, "loss": 1}], [], leaves=2), tmp_path / folder / "x"
        )
        assert [path.name for path in paths] == ["x.png", "x.svg"]
    for name in ("x.png", "x.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert dict(matplotlib.rcParams) == before


def test_drawing_needs_no_pyplot_and_so_no_display():
    code = "import sigmabranch.report, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_figure(tree_figure(cost(UNEVEN)), tmp_path / "file" / "x")
