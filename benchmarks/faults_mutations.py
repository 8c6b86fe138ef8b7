"""Files that were altered: refused in one line, or what they say is what they said before.

An altered file is one whose bytes were changed anywhere, or whose JSON was changed as JSON. Some
are sealed again, with hashes that fit nonsense: then any answer is allowed but a traceback, a hang,
a file read outside the folder, or twice the memory.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.faults_subjects import SUBJECTS, Subject

from sigmabranch.errors import SigmaBranchError
from sigmabranch.seals import is_ours, sealed

HANG_SECONDS = 30
#: What has hashes that can be made to fit.
SEALED = SUBJECTS.keys() - {"curves"}
#: Memory that reading one of these subjects may take on top of what it takes unaltered.
BUDGET_BYTES = 64 << 20
NONSENSE: tuple[Any, ...] = (
    *(-1, 0, 1, 2**31, 2**63, 10**30, 1e308, -0.5, True, None, "", "../../secret", "/etc/hostname"),
    *("x" * 10_000, "\x00", "0-0-0-0", [], {}, [[]], [0] * 1000, {"file": "../secret"}, [[0], [1]]),
)


class Hang(BaseException):
    """Reading took too long."""


class Watch:
    """What is opened while altered files are read."""

    def __init__(self) -> None:
        self.inside, self.outside = "", []
        self.allowed = (sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev", "/usr", "/lib")
        self.sources = str(Path(__file__).resolve().parents[1])
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not self.inside or not isinstance(arguments[0], str):
            return
        path = str(Path(arguments[0]).resolve())
        if not path.startswith((self.inside, *self.allowed, self.sources)):
            self.outside.append(path)


def mutated(
    folder: Path, known: dict[str, Counter], count: int, resealed: int, keep: Callable[[], None]
) -> Iterator[None]:
    """Alter each subject in so many ways, going on from what is known.

    Args:
        folder: to work in.
        known: subject → what was seen so far; filled.
        count: of alterations of each subject.
        resealed: of each subject, alterations with hashes that fit.
        keep: called now and then, to write down what is known.
    """
    watch = Watch()
    for name, subject in SUBJECTS.items():
        seen = known[name]
        place = folder / name.replace(" ", "-")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        (folder / "secret").write_text("secret")
        subject.write(place, 0)
        expected = subject.read(place)
        pristine = {path: path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()}
        bench = _Bench(name, subject, place, pristine, expected, watch)
        for number in range(seen["mutations"], count):
            bench.try_bytes(random.Random(f"{name} {number}"), seen)
            if number % 100 == 99:
                keep()
        for number in range(seen["resealed"], resealed if name in SEALED else 0):
            bench.try_sealed(random.Random(f"{name} sealed {number}"), seen)
        keep()
        yield


class _Bench:
    """One subject under alteration."""

    def __init__(
        self,
        name: str,
        subject: Subject,
        place: Path,
        pristine: dict[Path, bytes],
        expected: str,
        watch: Watch,
    ) -> None:
        self.name, self.subject, self.place, self.watch = name, subject, place, watch
        self.pristine, self.expected = pristine, expected
        foreign = ("foreign.csv",)
        self.files = [path for path in pristine if path.name not in foreign]
        if name == "curves":  # nobody reads them; their list is read
            self.files = [path for path in self.files if path.name == ".sigmabranch"]

    def try_bytes(self, draw: random.Random, seen: Counter) -> None:
        """One file altered; whatever it says now must be what it said, or refused."""
        path = draw.choice(self.files)
        before = self.pristine[path]
        content = before
        while content == before:
            content = _altered_json(before, draw) if draw.random() < 0.3 else _altered(before, draw)
        path.write_bytes(content)
        outcome, found = self._read()
        if outcome == "read":
            outcome = "same" if found == self.expected else "altered"
        if outcome not in ("same", "refused"):
            print(f"{self.name}, {path.name}: {outcome}: {found}")
        seen["mutations"] += 1
        seen[outcome] += 1
        self._restore()

    def try_sealed(self, draw: random.Random, seen: Counter) -> None:
        """One value of JSON made nonsense, or tensors altered, and all hashes made to fit."""
        path = draw.choice(self.files)
        content = _nonsense(self.pristine[path], draw)
        path.write_bytes(content)
        self._reseal(path, hashlib.sha256(content).hexdigest(), len(content))
        self.watch.outside.clear()
        peak = _memory()
        outcome, found = self._read()
        took = _memory() - peak
        if self.watch.outside:
            outcome, found = "outside", str(self.watch.outside)
        elif took > 2 * BUDGET_BYTES:
            outcome, found = "memory", f"{took:,} bytes"
        if outcome not in ("read", "refused"):
            print(f"{self.name} sealed, {path.name}: {outcome}: {found}")
        seen["resealed"] += 1
        seen[f"resealed_{outcome}"] += 1
        self._restore()

    def _reseal(self, altered: Path, digest: str, length: int) -> None:
        """Let whatever names the altered file by its hash name it as it is now."""
        old = hashlib.sha256(self.pristine[altered]).hexdigest()
        before = len(self.pristine[altered])
        for path in self.files:
            found = _parsed(self.pristine[path])
            if path == altered or not is_ours(found):
                continue
            text = json.dumps(found).replace(old, digest)
            text = text.replace(f'"bytes": {before}', f'"bytes": {length}')
            path.write_text(json.dumps(sealed(json.loads(text))))

    def _read(self) -> tuple[str, str]:
        signal.signal(signal.SIGALRM, _hang)
        signal.alarm(HANG_SECONDS)
        self.watch.inside = str(self.place.resolve())
        try:
            return "read", self.subject.read(self.place)
        except SigmaBranchError as error:
            return ("refused", "") if "\n" not in str(error) else ("traceback", "several lines")
        except Hang:
            return "hang", ""
        except Exception as error:
            return "traceback", f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            self.watch.inside = ""
            signal.alarm(0)

    def _restore(self) -> None:
        for path in [*self.place.rglob("*")]:
            if path.is_file() and path not in self.pristine:
                path.unlink()
        for path, content in self.pristine.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)


def _hang(*_: object) -> None:
    raise Hang


def _memory() -> int:
    """Most memory that the process has had since this was last asked."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(line.split()[1]) << 10


def _altered(content: bytes, draw: random.Random) -> bytes:
    """Bytes flipped, set, cut, lost, doubled, moved or added."""
    at = draw.randrange(len(content) or 1)
    size = min(draw.choice((1, 2, 7, 64, 4096)), len(content))
    before, part, after = content[:at], content[at : at + size], content[at + size :]
    flipped = bytes(byte ^ 1 << draw.randrange(8) for byte in part[:1])
    return draw.choice(
        (
            before + flipped + content[at + 1 :],
            before + draw.randbytes(len(part)) + after,
            before,
            before + after,
            before + part + part + after,
            before + bytes(len(part)) + after,
            content + draw.randbytes(size or 1),
            after + before,
        )
    )


def _altered_json(content: bytes, draw: random.Random) -> bytes:
    """JSON with one part lost or another; bytes altered where there is none."""
    found = _parsed(content)
    if not isinstance(found, dict):
        return _altered(content, draw)
    holder, key = draw.choice([*_places(found)])
    if draw.random() < 0.3 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = draw.choice(NONSENSE)
    return json.dumps(found, indent=1).encode() + b"\n"


def _nonsense(content: bytes, draw: random.Random) -> bytes:
    """JSON of ours with a part that is nonsense, sealed; lines of a journal likewise."""
    found = _parsed(content)
    if isinstance(found, dict):
        holder, key = draw.choice([*_places(found)])
        holder[key] = draw.choice(NONSENSE)
        return json.dumps(sealed(found) if is_ours(_parsed(content)) else found).encode()
    lines = content.split(b"\n")
    if isinstance(_parsed(lines[0]), dict):
        return _nonsense_lines(lines, draw)
    return _altered(content, draw)


def _nonsense_lines(lines: list[bytes], draw: random.Random) -> bytes:
    entries = [json.loads(line) for line in lines if line]
    holder, key = draw.choice([*_places(draw.choice(entries))])
    holder[key] = draw.choice(NONSENSE)
    last, written = "", b""
    for entry in entries:
        line = sealed({**entry, "after": last})
        last = line["sha256"]
        written += json.dumps(line, separators=(",", ":")).encode() + b"\n"
    return written


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every part of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in list(items):
        yield value, key
        if isinstance(part, dict | list):
            yield from _places(part)


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None
