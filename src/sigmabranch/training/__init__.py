"""Training dense networks and fine-tuning branched ones, with one loop."""

from sigmabranch.training.alarms import routing_alarms
from sigmabranch.training.api import finetune, train
from sigmabranch.training.batches import Batches, LoaderBatches
from sigmabranch.training.engine import (
    Engine,
    FabricEngine,
    launched,
    launched_rank,
    leave_processes,
    naming_lost_processes,
    resolve_device,
)
from sigmabranch.training.events import Event, Progress
from sigmabranch.training.logs import TensorBoardLog
from sigmabranch.training.loop import FitResult, fit
from sigmabranch.training.losses import LossTerms, branched_loss
from sigmabranch.training.objectives import (
    BranchedObjective,
    DenseObjective,
    Objective,
    RoutedObjective,
    StepOutput,
    finetuning,
)
from sigmabranch.training.recipe import FinetuneRecipe, Recipe

__all__ = [
    "Batches",
    "BranchedObjective",
    "DenseObjective",
    "Engine",
    "Event",
    "FabricEngine",
    "FinetuneRecipe",
    "FitResult",
    "LoaderBatches",
    "LossTerms",
    "Objective",
    "Progress",
    "Recipe",
    "RoutedObjective",
    "StepOutput",
    "TensorBoardLog",
    "branched_loss",
    "finetune",
    "finetuning",
    "fit",
    "launched",
    "launched_rank",
    "leave_processes",
    "naming_lost_processes",
    "resolve_device",
    "routing_alarms",
    "train",
]
