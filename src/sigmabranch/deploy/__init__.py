"""Packages, and the runtime that streams one path of them."""

from sigmabranch.deploy.package import Package, pack
from sigmabranch.deploy.runtime import Prediction, Runtime
from sigmabranch.deploy.trace import Trace

__all__ = ["Package", "Prediction", "Runtime", "Trace", "pack"]
