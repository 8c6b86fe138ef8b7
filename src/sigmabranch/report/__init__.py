"""Pictures, tables and the page that show what a branching saved and what it cost.

Tables load nothing; what draws is loaded on first use, because matplotlib takes a second.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sigmabranch.errors import MissingDependency

if TYPE_CHECKING:
    from sigmabranch.report.comparison_page import write_comparison
    from sigmabranch.report.page import Run, write_report
    from sigmabranch.report.search_figure import write_search
    from sigmabranch.report.simulation_figures import write_simulation

for _package in ("matplotlib", "jinja2"):
    if find_spec(_package) is None:
        raise MissingDependency(_package, "report", "Drawing the report")

from sigmabranch.report.ablation_table import ablation_table  # noqa: E402
from sigmabranch.report.best_table import best_table  # noqa: E402
from sigmabranch.report.budget_table import budget_table  # noqa: E402
from sigmabranch.report.comparison import comparison_table  # noqa: E402
from sigmabranch.report.main_table import main_rows, main_table  # noqa: E402
from sigmabranch.report.package_table import package_table  # noqa: E402
from sigmabranch.report.proposal_table import proposal_table  # noqa: E402
from sigmabranch.report.published_table import published_table  # noqa: E402
from sigmabranch.report.recipe_table import recipe_table  # noqa: E402
from sigmabranch.report.search_table import search_table  # noqa: E402
from sigmabranch.report.simulation_table import simulation_table  # noqa: E402
from sigmabranch.report.systems_table import systems_table  # noqa: E402
from sigmabranch.report.tables import (  # noqa: E402
    Table,
    accuracy_table,
    comparison,
    cost_table,
    node_table,
)

_DRAWING = {
    "Run": "page",
    "write_comparison": "comparison_page",
    "write_report": "page",
    "write_search": "search_figure",
    "write_simulation": "simulation_figures",
}

__all__ = [
    "Run",
    "Table",
    "ablation_table",
    "accuracy_table",
    "best_table",
    "budget_table",
    "comparison",
    "comparison_table",
    "cost_table",
    "main_rows",
    "main_table",
    "node_table",
    "package_table",
    "proposal_table",
    "published_table",
    "recipe_table",
    "search_table",
    "simulation_table",
    "systems_table",
    "write_comparison",
    "write_report",
    "write_search",
    "write_simulation",
]


def __getattr__(name: str) -> Any:
    if name not in _DRAWING:
        raise AttributeError(f"module 'sigmabranch.report' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sigmabranch.report.{_DRAWING[name]}"), name)
