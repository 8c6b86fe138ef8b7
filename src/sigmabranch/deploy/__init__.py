"""Packages, and the runtime that streams one path of them."""

import os

from sigmabranch.deploy.gpu_path import GpuPath, GpuPrediction
from sigmabranch.deploy.package import Package, pack
from sigmabranch.deploy.runtime import Prediction, Runtime, StreamPrediction
from sigmabranch.deploy.stream import StreamFilter
from sigmabranch.deploy.trace import Trace

__all__ = [
    "GpuPath",
    "GpuPrediction",
    "Package",
    "Prediction",
    "Runtime",
    "StreamFilter",
    "StreamPrediction",
    "Trace",
    "pack",
]

# Else ONNX Runtime, from 1.32 at the latest, keeps an identifier in the user's cache folder and
# reports to its maker. It looks when it is first imported, which only modules of this room do.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
