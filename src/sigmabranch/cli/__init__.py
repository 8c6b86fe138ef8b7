"""The command line: one file a verb."""

from sigmabranch.cli.app import main

__all__ = ["main"]
