"""The trees that meet a budget."""

from __future__ import annotations

from sigmabranch.conversion import BudgetPlan, Candidate
from sigmabranch.report.tables import Table

_ROWS = 12  # the first ones are the best by the rule


def budget_table(plan: BudgetPlan) -> Table:
    """One row per tree that is as good as any other in one respect, the one that is taken first."""
    taken, *others = plan.candidates
    shown = [taken, *(candidate for candidate in others if candidate.best)]
    dense = plan.budget.bytes(plan.dense_params)
    exact = "the masked dense network exactly"
    how = f"approximately ({'; '.join(plan.inexact)})" if plan.inexact else exact
    return Table(
        header=("cut at", "widths", "share", "active MB", "of dense", "stored MB", "MMACs"),
        groups=(("", tuple(_row(candidate, plan) for candidate in shown[:_ROWS])),),
        notes=(
            f"{len(plan.candidates)} trees meet {plan.budget.active_bytes / 1e6:.3f} MB a path at "
            f"{plan.budget.bits} bits; shown are those that no other beats in share, stored size "
            f"and MACs. Dense: {dense / 1e6:.3f} MB.",
            "Taken is the first: of those that spend the budget to 2 %, its most reduced level "
            f"keeps the largest share of its channels. It spends {plan.spent:.1%} of the budget "
            f"and computes {how}.",
        ),
    )


def _row(candidate: Candidate, plan: BudgetPlan) -> tuple[str, ...]:
    tree, sizes, size = candidate.tree, candidate.sizes, plan.budget.bytes
    return (
        " ".join(tree.cuts or ()) + (" +heads" if tree.heads else ""),
        " ".join(map(str, tree.widths or ())),
        f"{candidate.smallest_share:.2f}",
        f"{size(sizes.active_params) / 1e6:.3f}",
        f"{sizes.active_params / plan.dense_params:.1%}",
        f"{size(sizes.total_params) / 1e6:.3f}",
        f"{sizes.macs / 1e6:.1f}",
    )
