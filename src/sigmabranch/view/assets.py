"""The page's own files, read once."""

from __future__ import annotations

from importlib.resources import files

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


def assets() -> dict[str, tuple[str, bytes]]:
    """Path of a request → media type and content; ``"/"`` is the page."""
    found = {}
    for file in files(__package__).joinpath("page").iterdir():
        kind = _TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            found[f"/{file.name}"] = kind, file.read_bytes()
    found["/"] = found.pop("/index.html")
    return found
