"""Networks as files that other runtimes read, each compared with the network it is of."""

from sigmabranch.deploy.export.check import LeafCheck
from sigmabranch.deploy.export.formats import FORMATS, Export, check_format, export_net

__all__ = ["FORMATS", "Export", "LeafCheck", "check_format", "export_net"]
