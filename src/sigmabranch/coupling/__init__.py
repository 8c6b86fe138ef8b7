"""Which channels belong together, and how to cut them."""

from __future__ import annotations

from sigmabranch.coupling.cut import Keep, dropped_units, plan_slices
from sigmabranch.coupling.map import Axis, CouplingMap, Space
from sigmabranch.coupling.plan import SlicePlan, fingerprint
from sigmabranch.coupling.readers import Reader, last_reader
from sigmabranch.coupling.scores import channel_mean_to_unit, unit_scores_l1
from sigmabranch.coupling.trace import evaluating, trace
from sigmabranch.coupling.verify import TOLERANCE, masked_state, verify_slice
from sigmabranch.coupling.written import WRITTEN, unheard

__all__ = [
    "TOLERANCE",
    "WRITTEN",
    "Axis",
    "CouplingMap",
    "Keep",
    "Reader",
    "SlicePlan",
    "Space",
    "channel_mean_to_unit",
    "dropped_units",
    "evaluating",
    "fingerprint",
    "last_reader",
    "masked_state",
    "plan_slices",
    "trace",
    "unheard",
    "unit_scores_l1",
    "verify_slice",
]
