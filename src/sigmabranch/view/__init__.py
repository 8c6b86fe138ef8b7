"""Packages at work in a browser: a local page that shows what each input reads and runs."""

from sigmabranch.view.inputs import Inputs, open_inputs
from sigmabranch.view.network import Network
from sigmabranch.view.server import serve
from sigmabranch.view.show import Show

__all__ = ["Inputs", "Network", "Show", "open_inputs", "serve"]
