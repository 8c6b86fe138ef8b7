"""A headless Chromium that is asked for a page until the page says what it should."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
)


class Page:
    """One open page, driven over the pipe that the browser reads on fd 3 and answers on fd 4."""

    def __init__(self, requests: int, answers: int, url: str) -> None:
        self._requests = requests
        self._answers = os.fdopen(answers, "rb")
        self._session: dict[str, str] = {}
        self._number = 0
        target = self._ask("Target.createTarget", url=url)["targetId"]
        opened = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": opened["sessionId"]}

    def content(self, until: str, seconds: float) -> str:
        """The page's HTML as soon as it contains ``until``; what there is after ``seconds``."""
        last = time.monotonic() + seconds
        while True:
            told = self._ask("Runtime.evaluate", expression="document.documentElement.outerHTML")
            html = str(told["result"].get("value", ""))
            if until in html or time.monotonic() > last:
                return html
            time.sleep(0.2)

    def _ask(self, method: str, **params: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._requests, json.dumps(message).encode() + b"\0")
        return next(told["result"] for told in self._told() if told.get("id") == self._number)

    def _told(self) -> Iterator[Any]:
        message = b""
        while byte := self._answers.read(1):
            if byte == b"\0":
                yield json.loads(message)
                message = b""
            else:
                message += byte


@contextmanager
def opened(url: str, profile: Path) -> Iterator[Page]:
    """A page at ``url`` in a browser of its own, whose profile lies in the folder ``profile``."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    browser = subprocess.Popen(
        [
            *("bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash"),
            *(str(CHROMIUM), *_FLAGS, f"--user-data-dir={profile}"),
        ],
        pass_fds=(theirs_in, theirs_out),
        stderr=subprocess.DEVNULL,  # it complains about a missing desktop
    )
    os.close(theirs_in)
    os.close(theirs_out)
    page = None
    try:
        page = Page(ours_out, ours_in, url)
        yield page
    finally:
        browser.kill()
        browser.wait()
        os.close(ours_out)
