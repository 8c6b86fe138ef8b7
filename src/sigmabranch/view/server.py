"""The page's server, for browsers on this machine alone."""

from __future__ import annotations

import sys
import threading
import webbrowser
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from sigmabranch.errors import ConfigError
from sigmabranch.view.assets import assets
from sigmabranch.view.handler import Handler
from sigmabranch.view.show import Show

ADDRESS = "127.0.0.1"
# Each may hold a thread, and of these so many a picture of ``MOST_BYTES``.
MOST_CONNECTIONS, MOST_UPLOADS = 32, 4


def serve(show: Show, port: int, *, open_browser: bool = False) -> None:
    """Serve the page until Ctrl-C; its address is printed.

    Args:
        show: what the page shows.
        port: 0 for any that is free.
        open_browser: show it in the browser at once.

    Raises:
        ConfigError: the port cannot be had.
    """
    try:
        server = Server(show, port)
    except OSError as error:
        raise ConfigError(
            f"port {port} cannot be had ({error.strerror}): choose another, or 0 for any"
        ) from error
    with server:
        address = f"http://{ADDRESS}:{server.server_port}"
        print(address, flush=True)
        try:
            if open_browser:
                webbrowser.open(address)
            server.serve_forever()
        except KeyboardInterrupt:
            return


class Server(ThreadingHTTPServer):
    """A server of one show, reachable from this machine.

    Attributes:
        show: what the page shows.
        assets: path → media type and content of the page's own files.
        hosts: values of the Host header that mean this server.
        uploads: as many as may be held at once.
    """

    def __init__(self, show: Show, port: int) -> None:
        super().__init__((ADDRESS, port), Handler)
        self.show, self.assets = show, assets()
        self.uploads = threading.BoundedSemaphore(MOST_UPLOADS)
        self._connections = threading.BoundedSemaphore(MOST_CONNECTIONS)
        names = (ADDRESS, "localhost")
        self.hosts = {f"{name}:{self.server_port}" for name in names}
        if self.server_port == 80:  # browsers leave out what HTTP has by default
            self.hosts.update(names)

    def server_bind(self) -> None:
        """Without the base class's look-up of the host's name, which can take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, self.socket.getsockname()[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for it, unless there are too many; then it is closed."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be had
            self._connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer it."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of browsers that go away."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)
