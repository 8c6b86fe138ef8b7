"""The comparison: every system on the same bench, row by row and seed by seed.

folder/
  source/           the dense network that all rows start from
  seed0/            the branched network and, in rows/, one folder a row
    rows/NAME/row.json
  comparison.json   all rows
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sigmabranch import files
from sigmabranch.archive import WEIGHTS, read_manifest
from sigmabranch.data import Dataset
from sigmabranch.errors import CheckpointError, ProcessLost
from sigmabranch.peers.bench import Bench
from sigmabranch.peers.catalog import find_control
from sigmabranch.peers.row import measure_row
from sigmabranch.peers.system import System
from sigmabranch.tasks import Chain, Stopped, Task
from sigmabranch.tasks.provenance import provenance
from sigmabranch.tasks.task import completed, first_difference

ROW = "row.json"
SCHEMA = 1
_KEYS = {"schema", "task", "source", "rows"}


@dataclass(kw_only=True)
class Comparison:
    """All rows of one task over some seeds.

    Attributes:
        task: data, source network, tree and the one recipe.
        folder: of everything it writes.
        rows: row → system.
        groups: heading → rows, for the table.
        skipped: row → why the task cannot have it.
        seeds: of fine-tuning, conversion and whatever else a row draws; the source network is that
            of the first.
        chain: makes a :class:`~sigmabranch.tasks.Chain` of the task: (folder, seed, start, data if
            they have been read) → chain.
        known: results of earlier comparisons, whose rows are taken over instead of being made.
        say: told in one line what begins, ends or fails.
        failed: (row, seed) → why, of this call.
    """

    task: Task
    folder: Path
    rows: Mapping[str, System]
    groups: Mapping[str, Sequence[str]]
    skipped: Mapping[str, str]
    seeds: Sequence[int]
    chain: Callable[[Path, int, Mapping[str, Path], Dataset | None], Chain]
    known: Sequence[Mapping[str, Any]] = ()
    say: Callable[[str], None] = print
    failed: dict[tuple[str, int], str] = field(default_factory=dict)

    def run(self, *, make: bool = True) -> dict[str, Any]:
        """Make and measure every row that is not there yet, seed by seed.

        A row that fails is reported, kept in :attr:`failed` and tried again by the next call; the
        others go on.

        Args:
            make: false only gathers what is there; the source network must be.

        Returns:
            The comparison as :meth:`result` gives it.

        Raises:
            CheckpointError: the folder or a known result belongs to other settings.
            Stopped: the time is up; the next call continues.
        """
        self._check_folder()
        self._check_known()
        if not make:
            read_manifest(self.folder / "source" / "dense", "dense")  # refuses where there is none
        source = self.chain(self.folder / "source", self.seeds[0], {}, None)
        source.dense()
        self._take_over(source)
        for seed in self.seeds if make else ():
            start = {"dense": source.folder / "dense"}
            chain = self.chain(self.folder / f"seed{seed}", seed, start, source.dataset)
            for name, system in self.rows.items():
                self._row(name, system, chain)
        return self.result(source)

    def _check_folder(self) -> None:
        """Refuse a folder of something else, or with a row of other settings, before any work."""
        files.check_free(self.folder / "comparison.json")
        for seed in self.seeds:
            for name, system in self.rows.items():
                read_row(self.folder / f"seed{seed}", name, system)

    def _check_known(self) -> None:
        """Refuse a known result that is none, or of another task, before any work."""
        for result in self.known:
            if not _is_result(result):
                raise CheckpointError(
                    "an included file is no result of compare: give what its --result wrote"
                )
            if result["schema"] != SCHEMA:
                raise CheckpointError(
                    f"an included result has schema {result['schema']}, this version reads "
                    f"{SCHEMA}: make it again"
                )
            difference = first_difference(completed(result["task"]), self.task.to_dict())
            if difference:
                raise CheckpointError(f"an included result is of another task: {difference}")

    def _take_over(self, source: Chain) -> None:
        """Put the known rows where this comparison would have made them."""
        weights = source_digest(source)
        for result in self.known:
            if result["source"]["sha256"] != weights:
                raise CheckpointError(
                    "an included result starts from another source network: give that one with "
                    "--dense, or compare its rows in a table of their own"
                )
            for name, system in self.rows.items():
                for seed, row in result["rows"].get(name, {}).items():
                    if int(seed) in self.seeds:
                        self._take_over_row(source, name, system, int(seed), row)

    def _take_over_row(
        self, source: Chain, name: str, system: System, seed: int, row: Mapping[str, Any]
    ) -> None:
        path = row_path(self.folder / f"seed{seed}", name)
        if path.exists():
            return
        if system.made(row["system"]):
            source.once(partial(files.write_json, path, row))
        else:
            self.say(f"{name}, seed {seed}: the included row has other settings and is left out")

    def _row(self, name: str, system: System, chain: Chain) -> None:
        """Make one row, unless it is there; a failure is kept, not raised."""
        if read_row(chain.folder, name, system) is not None:
            return
        self.say(f"{name}, seed {chain.seed}: begins")
        try:
            row = run_row(name, system, chain)
        except (Stopped, ProcessLost):
            raise
        except Exception as error:  # whatever one system trips over must not cost the others
            reason = " ".join(str(error).split()) or type(error).__name__
            self.failed[name, chain.seed] = reason
            self.say(f"{name}, seed {chain.seed}: failed: {reason}")
            return
        top1, active = row["accuracy"]["top1"], row["cost"]["net"]["active_params"]
        self.say(f"{name}, seed {chain.seed}: {top1:.2f} % top-1, {active:,.0f} active parameters")
        gc.collect()

    def result(self, source: Chain) -> dict[str, Any]:
        """Everything measured so far, JSON-able; also written to the folder."""
        result = {
            "schema": SCHEMA,
            "task": self.task.to_dict(),
            "provenance": provenance(source.engine.device),
            "source": {
                "seed": _manifest(source)["notes"]["seed"],
                "sha256": source_digest(source),
                **self._source_accuracy(source),
            },
            "rows": {
                name: {str(seed): row for seed, row in self._measured(name, system).items()}
                for name, system in self.rows.items()
            },
            "groups": {heading: list(names) for heading, names in self.groups.items()},
            "skipped": dict(self.skipped),
            "failed": [
                {"row": name, "seed": seed, "reason": reason}
                for (name, seed), reason in self.failed.items()
            ],
        }
        source.once(lambda: files.write_json(self.folder / "comparison.json", result))
        return result

    def _measured(self, name: str, system: System) -> dict[int, dict[str, Any]]:
        paths = {seed: row_path(self.folder / f"seed{seed}", name) for seed in self.seeds}
        # Rows of earlier versions get the fields that have come since.
        settings = {"system": system.to_dict()}
        return {
            seed: files.read_json(path) | settings for seed, path in paths.items() if path.exists()
        }

    def _source_accuracy(self, source: Chain) -> dict[str, Any]:
        """``accuracy`` on the test split, ``held_out`` on the held-out one where there is one."""
        found = {"accuracy": _kept(source, "accuracy.json", "test")}
        if self.task.data.held_out is not None:
            found["held_out"] = _kept(source, "held_out.json", "held-out")
        return found


def _kept(source: Chain, file: str, split: str) -> dict[str, Any]:
    """The source network's accuracy on a split, measured once."""
    path = source.folder / file
    if not path.exists():
        accuracy = source.dense_accuracy(split)
        source.once(lambda: files.write_json(path, accuracy))
    return files.read_json(path)


def _is_result(result: Any) -> bool:
    """Whether a file's content has the form of :meth:`Comparison.result`."""
    if not isinstance(result, Mapping) or not result.keys() >= _KEYS:
        return False
    known = isinstance(result["source"], Mapping) and isinstance(result["rows"], Mapping)
    return (
        known
        and "sha256" in result["source"]
        and all(_is_row(by_seed) for by_seed in result["rows"].values())
    )


def _is_row(by_seed: Any) -> bool:
    return isinstance(by_seed, Mapping) and all(
        seed.isdecimal() and isinstance(row, Mapping) and isinstance(row.get("system"), Mapping)
        for seed, row in by_seed.items()
    )


def source_digest(source: Chain) -> str:
    """SHA-256 of the source network's weights."""
    return _manifest(source)["files"][WEIGHTS]["sha256"]


def _manifest(source: Chain) -> dict[str, Any]:
    return read_manifest(source.folder / "dense", "dense")


def check_rows(rows: Iterable[System], task: Task) -> None:
    """Raise :class:`ConfigError` at the first system that is impossible for ``task``.

    To be called before any work is done.
    """
    for system in rows:
        system.check(task)


def run_row(name: str, system: System, chain: Chain) -> dict[str, Any]:
    """Make and measure one row in the chain's folder."""
    path = row_path(chain.folder, name)
    bench = Bench(chain=chain, folder=path.parent)
    row = {
        **measure_row(system, system.run(bench), bench),
        "seed": chain.seed,
        "provenance": provenance(chain.engine.device, chain.engine.world_size, chain.accumulate),
    }
    chain.once(lambda: files.write_json(path, row))
    return row


def read_row(folder: Path, name: str, system: System) -> dict[str, Any] | None:
    """A row that is complete, or None.

    Raises:
        CheckpointError: the folder holds the row of a system with other settings.
    """
    path = row_path(folder, name)
    if not path.exists():
        return None
    row = files.read_json(path)
    if not (isinstance(row, dict) and isinstance(row.get("system"), dict)):
        raise CheckpointError(f"{path} is no row of a comparison: remove it")
    if not system.made(row["system"]):
        raise CheckpointError(
            f"{path.parent} holds {name} with other settings: choose another --out or remove it"
        )
    return row


def row_path(folder: Path, name: str) -> Path:
    """Where a row's figures are kept."""
    return folder / "rows" / name / ROW


def run_control(chain: Chain, name: str) -> dict[str, Any]:
    """One control of :data:`~sigmabranch.peers.catalog.CONTROLS` for a chain's result.

    Returns:
        JSON-able: ``params`` that are active, ``macs``, ``epochs``, and the accuracies.

    Raises:
        ConfigError: an unknown control, or one that is impossible for the task.
        Stopped: the chain's time is up; the checkpoint holds the state.
    """
    system = find_control(name)
    row = read_row(chain.folder, name, system) or run_row(name, system, chain)
    net = row["cost"]["net"]
    return {
        "params": net["active_params"],
        "macs": net["macs"],
        "epochs": row["epochs"],
        **row["accuracy"],
    }
