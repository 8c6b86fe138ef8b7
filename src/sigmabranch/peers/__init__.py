"""What a branched network must be compared with."""

from sigmabranch.peers.controls import CONTROLS, check_controls, dense_of_size, run_control

__all__ = ["CONTROLS", "check_controls", "dense_of_size", "run_control"]
