"""Fetch a public data set, check it, and leave it where ``sigmabranch run --data`` finds it.

    python examples/prepare_data.py cifar100 data/cifar100
    python examples/prepare_data.py modelnet40 data/modelnet40

Nothing is kept of an archive that is incomplete or that its reader refuses. ImageNet needs an
account with its publisher, so its folders are yours to make.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path
from urllib.parse import urlsplit

from sigmabranch.data import open_data
from sigmabranch.errors import SigmaBranchError

SOURCES = {
    "cifar100": "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    "modelnet40": "https://shapenet.cs.stanford.edu/media/modelnet40_ply_hdf5_2048.zip",
}


def main() -> int:
    """Run the command line; exit code 2 if there is no data set at its end."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("name", choices=SOURCES)
    options.add_argument("folder", type=Path)
    options.add_argument("--url", help="another place that holds the same archive")
    chosen = options.parse_args()
    try:
        prepare(chosen.name, chosen.folder, chosen.url or SOURCES[chosen.name])
    except (SigmaBranchError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        print(f"prepare_data: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def prepare(name: str, folder: Path, url: str) -> None:
    """Download into a temporary folder beside ``folder``, check, then move into place."""
    if folder.exists():
        raise OSError(f"{folder} is there already: remove it, or choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".prepare-") as place:
        inside = Path(place) / "data"
        inside.mkdir()
        archive = inside / Path(urlsplit(url).path).name
        download(url, archive)
        if archive.suffix == ".zip":
            shutil.unpack_archive(archive, inside)
            archive.unlink()
        data = open_data(name, inside)
        inside.replace(folder)
    print(f"{folder}: {name}, {len(data.train):,} training and {len(data.test):,} test samples")


def download(url: str, target: Path) -> None:
    """Copy ``url`` into ``target``, whole."""
    try:
        with urllib.request.urlopen(url, timeout=60) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
            promised = source.headers.get("Content-Length")
    except urllib.error.URLError as error:
        raise OSError(f"cannot fetch {url}: {error.reason}") from error
    if promised is not None and target.stat().st_size != int(promised):
        raise OSError(f"{url} broke off: {target.stat().st_size} of {promised} bytes; try again")


if __name__ == "__main__":
    sys.exit(main())
