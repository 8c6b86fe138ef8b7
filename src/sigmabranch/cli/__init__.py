"""The command line: one file a verb."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line: one line and an exit code, however it ends."""
    try:
        # It imports torch, which takes seconds; an interrupt then must not show where.
        from sigmabranch.cli.app import main as run  # noqa: PLC0415
    except KeyboardInterrupt:
        print("sigmabranch: interrupted before it began", file=sys.stderr)
        sys.exit(130)
    run()
