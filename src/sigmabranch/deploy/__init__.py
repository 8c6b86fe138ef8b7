"""Packages, and the runtime that streams one path of them."""

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
