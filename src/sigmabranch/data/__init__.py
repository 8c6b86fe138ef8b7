"""Data sets: readers, splits that yield normalised batches, and their augmentation."""

from sigmabranch.data.batches import EpochBatches, Share, own_rows, own_samples
from sigmabranch.data.conditions import ConditionSplit
from sigmabranch.data.registry import DATA_NAMES, EMBEDDED, check_data, input_shape, open_data
from sigmabranch.data.seeds import derive_seed
from sigmabranch.data.split import Dataset, ResidentSplit, Split

__all__ = [
    "DATA_NAMES",
    "EMBEDDED",
    "ConditionSplit",
    "Dataset",
    "EpochBatches",
    "ResidentSplit",
    "Share",
    "Split",
    "check_data",
    "derive_seed",
    "input_shape",
    "open_data",
    "own_rows",
    "own_samples",
]
