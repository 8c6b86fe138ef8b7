"""Reading a comparison: one recipe, one yardstick, and no mean over different settings.

What ``sigmabranch compare`` writes comes in as JSON and leaves as a
:class:`~sigmabranch.report.compared.Compared`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sigmabranch.errors import CheckpointError, ConfigError
from sigmabranch.report.compared import FULL_BITS, Compared, Entry, Range
from sigmabranch.tasks import Spread
from sigmabranch.training import Recipe

SCHEMA = 1
REFERENCE = "dense (source)"
OTHERS = "others"
NOT_TRAINED = "not trained"

# What all rows of a table share. The rest of a recipe is a method's own, or changes no result.
_SHARED = (
    "epochs", "batch_size", "optimizer", "lr", "momentum", "betas", "weight_decay",
    "decay_norm_and_bias", "schedule", "warmup_epochs", "step_epochs", "step_factor",
    "label_smoothing", "clip_norm", "distill_weight", "distill_temperature", "precision",
    "ema_decay",
)  # fmt: skip
_DEFAULTS = Recipe().to_dict()
# Routing rules that look at the answer: ceilings, not systems.
_CEILINGS = ("class", "oracle")


def read_comparison(found: Mapping[str, Any]) -> Compared:
    """Check a comparison and average it over seeds.

    Args:
        found: what ``sigmabranch compare`` writes; ``groups`` (name → rows) and ``skipped`` may be
            missing.

    Raises:
        CheckpointError: no comparison, another version's file, or a row whose seeds have different
            settings, test sets or counting conventions.
        ConfigError: no row at all, or one of another recipe that does not say so.
    """
    try:
        return _read(found)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"this is no comparison ({error!r}): give the file that compare --result wrote"
        ) from error


def _read(found: Mapping[str, Any]) -> Compared:
    if found.get("schema") != SCHEMA:
        raise CheckpointError(
            f"the comparison has schema {found.get('schema')}, this version reads {SCHEMA}: "
            "run compare again on its folder"
        )
    failed = tuple(f"{f['row']}, seed {f['seed']}: {f['reason']}" for f in found["failed"])
    tried = {f["row"] for f in found["failed"]}
    made = {name: rows for name, rows in found["rows"].items() if rows}
    if not made:
        raise ConfigError("; ".join(("no row of the comparison is there", *failed)))
    groups = _groups(found, made)
    # A row that stands in two groups belongs to the first.
    group_of = {name: group for group in reversed(groups) for name in groups[group]}
    samples = found["source"]["accuracy"]["samples"]
    _check_yardstick(made, samples)
    entries = [
        _entry(name, group_of[name], rows, found["task"]["finetune"]) for name, rows in made.items()
    ]
    order = list(groups)
    entries.sort(key=lambda entry: (order.index(entry.group), -entry.top1.mean, entry.name))
    cost = next(_rows(made))[1]["cost"]
    return Compared(
        task=found["task"]["name"],
        reference=_reference(found, cost["dense"]),
        entries=tuple(entries),
        evaluation=found["source"]["accuracy"],
        convention=cost["convention"],
        missing=tuple(name for name in found["rows"] if name not in {*made, *tried}),
        failed=failed,
        skipped=tuple(f"{name}: {why}" for name, why in found.get("skipped", {}).items()),
        provenance=found.get("provenance", {}),
    )


def _groups(found: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """Group → rows; what is in none goes last."""
    groups = dict(found.get("groups") or {})
    if not groups:
        return {"": list(made)}
    known = {name for names in groups.values() for name in names}
    return {**groups, OTHERS: [name for name in made if name not in known]}


def _rows(made: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(row and seed as text, row)."""
    for name, by_seed in made.items():
        for seed, row in by_seed.items():
            yield f"{name}, seed {seed},", row


def _check_yardstick(made: Mapping[str, Mapping[str, Any]], samples: int) -> None:
    convention = next(_rows(made))[1]["cost"]["convention"]
    for where, row in _rows(made):
        if row["accuracy"]["samples"] != samples:
            raise CheckpointError(
                f"{where} was measured on {row['accuracy']['samples']} test samples, the source "
                f"network on {samples}: measure them alike"
            )
        if row["cost"]["convention"] != convention:
            raise CheckpointError(
                f"{where} was counted by another convention than the others: make it again"
            )


def _entry(
    name: str, group: str, by_seed: Mapping[str, Mapping[str, Any]], recipe: Mapping[str, Any]
) -> Entry:
    rows = [by_seed[seed] for seed in sorted(by_seed, key=int)]
    first = rows[0]
    if any(row["system"] != first["system"] for row in rows):
        raise CheckpointError(
            f"row {name} has different settings in seeds {', '.join(by_seed)}: nothing is "
            "averaged over settings; make it again with the same ones"
        )
    for row in rows:
        _check_recipe(name, row, recipe)
    nets = [row["cost"]["net"] for row in rows]
    bits = 8 * first["active_bytes"]["max"] / first["cost"]["net"]["active_params_max"]
    ceiling = first["system"].get("rule") in _CEILINGS
    return Entry(
        name=name,
        group=group,
        system=first["system"],
        epochs=first["epochs"],
        footnotes=tuple(dict.fromkeys(n for row in rows for n in _footnotes(row, bits, ceiling))),
        stored=statistics.fmean(net["total_params"] for net in nets),
        active=_range((net["active_params"], net["active_params_max"]) for net in nets),
        macs=_range((net["macs"], net["macs_max"]) for net in nets),
        read=_range((row["active_bytes"]["mean"], row["active_bytes"]["max"]) for row in rows),
        bits=bits,
        top1_by_seed={int(seed): by_seed[seed]["accuracy"]["top1"]
                      for seed in sorted(by_seed, key=int)},
        held_out=_spread(rows, "held_out", "top1"),
        gain=_spread(rows, "accuracy", "routing_gain"),
        balance=_spread(rows, "accuracy", "balance"),
        latency=_latency(rows),
        ceiling=ceiling,
        recipe=first["recipe"],
        routing=_routing(first),
    )  # fmt: skip


def _check_recipe(name: str, row: Mapping[str, Any], table: Mapping[str, Any]) -> None:
    """A row of another recipe must say so."""
    if row["mark"] or row["recipe"] is None:
        return
    own, shared = {**_DEFAULTS, **row["recipe"]}, {**_DEFAULTS, **table}
    for field in _SHARED:
        if _listed(own[field]) != _listed(shared[field]):
            raise ConfigError(
                f"a table of one recipe: row {name} has {field} {own[field]}, the task's "
                f"fine-tuning {shared[field]}, and no mark that says so"
            )


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _footnotes(row: Mapping[str, Any], bits: float, ceiling: bool) -> Iterator[str]:
    if row["mark"]:
        yield row["mark"]
    elif row["recipe"] is None:
        yield NOT_TRAINED
    if rule := row["notes"].get("rule"):
        yield f"the branched network's trained leaves, under another rule: {rule}"
    if ceiling:
        yield "needs the true label: a ceiling, not a system"
    if bits < FULL_BITS:
        yield f"{bits:.3g} bits per weight"


def _range(pairs: Iterable[tuple[float, float]]) -> Range:
    means, largest = zip(*pairs, strict=True)
    return Range(statistics.fmean(means), max(largest))


def _spread(rows: Sequence[Mapping[str, Any]], part: str, key: str) -> Spread | None:
    parts = [row.get(part, {}) for row in rows]
    values = [figures[key] for figures in parts if figures.get(key) is not None]
    return Spread.of(values) if values else None


def _latency(rows: Sequence[Mapping[str, Any]]) -> float | None:
    ratios = [row["latency"]["ratio"] for row in rows if row.get("latency")]
    return statistics.fmean(ratios) if ratios else None


def _routing(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    parts = (row["accuracy"], row["notes"])
    return next((part for part in parts if part.get("class_leaf_share")), None)


def _reference(found: Mapping[str, Any], dense: Mapping[str, Any]) -> Entry:
    params, macs = dense["params"], dense["macs"]
    source = found["source"]
    return Entry(
        name=REFERENCE,
        system={},
        epochs=found["task"]["dense"]["epochs"],
        stored=params,
        active=Range(params, params),
        macs=Range(macs, macs),
        read=Range(4 * params, 4 * params),
        top1_by_seed={source["seed"]: source["accuracy"]["top1"]},
        held_out=_spread([source], "held_out", "top1"),
        latency=1.0,
        recipe=found["task"]["dense"],
    )
