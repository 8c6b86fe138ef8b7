"""The viewer: what the page is told is what the network says, and nobody else is told anything."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sysconfig
import threading
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from chromium import CHROMIUM, opened
from conftest import randomise
from sigmabranch.data import open_data
from sigmabranch.deploy import Package, Runtime, pack
from sigmabranch.errors import ConfigError
from sigmabranch.tasks import find_task
from sigmabranch.tasks.counting import example, sketch
from sigmabranch.view import Inputs, Network, Show, serve
from sigmabranch.view.handler import MOST_BYTES
from sigmabranch.view.server import MOST_CONNECTIONS, MOST_UPLOADS, Server

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("sklearn", "PIL")), reason="needs the data extra"
)

COMMAND = Path(sysconfig.get_path("scripts")) / "sigmabranch"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TIMEOUT = 60
NAMES = [f"class {number}" for number in range(100)]


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


def packed(task, folder: Path) -> tuple[Package, Package]:
    """A branched and a dense network of a task, with random weights."""
    dense, net = sketch(task)
    notes = {"task": task.to_dict(), "seed": 0}
    x = example(task)
    usage = {"0-0": 0.4, "0-1": 0.3, "1-0": 0.2, "1-1": 0.1}
    branched = pack(randomise(net), folder / "branched", x, usage=usage, notes=notes)
    return branched, pack(randomise(dense), folder / "dense", x, notes=notes)


# -- the command, on digits ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(task, tmp_path_factory):
    return packed(task, tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def process(digits):
    branched, dense = digits
    process = subprocess.Popen(
        [COMMAND, "view", branched.folder, "--dense", dense.folder],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def port(process):
    address = process.stdout.readline()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+\n", address), process.communicate()[1]
    return int(address.rpartition(":")[2])


def test_the_page_and_its_files_come_from_here_and_may_load_nothing_else(port):
    page = ask(port, "GET", "/?sample=3")
    assert page.status == 200
    assert page.headers["Content-Type"].startswith("text/html")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    text = page.body.decode()
    linked = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert len(linked) >= 3
    for path in linked:
        assert ask(port, "GET", path).status == 200, path
    modules = re.findall(r'from "\.(/\w+\.js)"', ask(port, "GET", "/main.js").body.decode())
    assert modules
    assert all(ask(port, "GET", path).status == 200 for path in modules)


def test_the_page_is_told_what_there_is(port, digits):
    told = ask(port, "GET", "/show").json
    assert (told["title"], told["samples"], told["pictures"]) == ("digits-resnet", 40, False)
    for network, package in zip(told["networks"], digits, strict=True):
        assert network["kind"] == package.network["kind"]
        assert network["usage"] == package.usage
        assert {row["node"]: row["bytes"] for row in network["nodes"]} == {
            key: node.weight_bytes for key, node in package.nodes.items()
        }


def test_a_sample_gives_what_the_runtimes_give(port, digits, task):
    test = open_data("digits").limit(test=task.data.test_limit).test
    told = ask(port, "POST", "/samples/7").json
    x, label = next(iter(test.batches(torch.tensor([7]), 1)))
    assert told["input"]["truth"] == str(int(label))
    picture = told["input"]["preview"]
    assert (picture["width"], picture["height"], picture["channels"]) == (8, 8, 1)
    for network, package in zip(told["networks"], digits, strict=True):
        with Runtime.open(package.folder) as runtime:
            logits, leaf, _ = runtime.predict(x)
        assert network["leaf"] == network["trace"]["leaf"] == leaf
        assert network["trace"]["nodes"][-1]["node"] == leaf
        probability, best = logits.softmax(0).topk(5)
        assert [row["class"] for row in network["top"]] == [str(int(label)) for label in best]
        found = torch.tensor([row["probability"] for row in network["top"]])
        torch.testing.assert_close(found, probability, rtol=1e-4, atol=1e-6)


def test_after_forgetting_a_sample_is_read_again_and_totals_add_up(port):
    def run():
        return ask(port, "POST", "/samples/3").json["networks"][1]

    first = run()
    warm = run()
    assert warm["trace"]["bytes_read"] == 0
    assert ask(port, "POST", "/forget").status == 200
    cold = run()
    assert cold["trace"]["bytes_read"] > 0 == cold["trace"]["hit_bytes"]
    assert cold["totals"]["inputs"] == first["totals"]["inputs"] + 2
    grown = cold["totals"]["bytes_read"] - first["totals"]["bytes_read"]
    assert grown == cold["trace"]["bytes_read"] == cold["totals"]["last_bytes_read"][-1]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/../handler.py", 404),
        ("GET", "/index.html", 404),
        ("GET", "/forget", 404),
        ("POST", "/", 404),
        ("POST", "/samples/40", 404),
        ("POST", "/samples/-1", 404),
        ("POST", "/samples/1e1", 404),
        ("POST", "/samples/9999999999", 404),
        ("DELETE", "/show", 501),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(port, method, path, status):
    answer = ask(port, method, path)
    assert answer.status == status
    assert answer.body.count(b"\n") == 1 and list(answer.json) == ["error"]
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/show"), ("POST", "/forget")])
def test_another_name_for_this_server_is_refused(port, method, path):
    for host in ("example.org", f"example.org:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}"):
        assert ask(port, method, path, Host=host).status == 421, host
    assert ask(port, method, path, Host=f"localhost:{port}").status == 200


def test_only_our_own_page_makes_the_networks_run(port):
    for origin in ("http://example.org", "null", f"https://127.0.0.1:{port}"):
        assert ask(port, "POST", "/samples/1", Origin=origin).status == 403, origin
    assert ask(port, "POST", "/samples/1", Origin=f"http://127.0.0.1:{port}").status == 200


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_the_answer(port, tmp_path):
    told = ask(port, "POST", "/samples/5").json
    with opened(f"http://127.0.0.1:{port}/?sample=5", tmp_path) as browser:
        page = browser.content(until="Sample 5. Branched: ", seconds=TIMEOUT)
    branched, _ = told["networks"]
    assert f"Answer of leaf {branched['leaf']}" in page
    assert f"True class: {told['input']['truth']}" in page
    assert len(re.findall(r'<g [^>]*class="lit"', page)) == len(branched["trace"]["nodes"]) + 1
    assert re.search(r'role="status"[^>]*>Sample 5\. Branched: ', page)


def test_an_interrupt_ends_it_well(process, port):
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out, err) == (0, "", "")


# -- pictures, in this process -------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture_port(tmp_path_factory):
    task = find_task("cifar100-small").with_settings(
        ("model.layers=[1,1,1]", "model.planes=[2,3,4]", "model.strides=[2,2,2]")
    )
    network = randomise(task.model.build())
    package = pack(network, tmp_path_factory.mktemp("pictures"), example(task))
    inputs = Inputs(data="cifar100", shape=(3, 32, 32), test=None, class_names=NAMES)
    with ExitStack() as stack:
        runtime = stack.enter_context(Runtime.open(package.folder))
        show = stack.enter_context(Show(task.name, inputs, [Network(runtime, best)]))
        server = stack.enter_context(Server(show, 0))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def best(prediction):
    return {"best": NAMES[int(prediction.logits.argmax())]}


def encoded(kind: str, size: tuple[int, int] = (48, 32), colour: str = "#c04010") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_a_picture_of_any_size_is_run_and_shown_as_the_network_sees_it(picture_port, kind):
    told = ask(picture_port, "POST", "/picture", encoded(kind)).json
    assert (told["input"]["title"], told["input"]["truth"]) == ("Your picture", None)
    assert told["networks"][0]["best"] in NAMES
    picture = told["input"]["preview"]
    pixels = base64.b64decode(picture["pixels"])
    assert len(pixels) == 3 * 32 * 32
    assert all(
        abs(one - other) <= 3 for one, other in zip(pixels[:3], b"\xc0\x40\x10", strict=True)
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no picture"),
        (b"plain words, whatever the file is called", "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "no picture"),
        (encoded("PNG")[:40] if find_spec("PIL") else b"", "the upload"),
        (b"\xff\xd8\xff" + bytes(100), "the upload"),
        (encoded("PNG", (10_000, 5_001)) if find_spec("PIL") else b"", "pixels"),
        (encoded("PNG", (20_000, 1)) if find_spec("PIL") else b"", "the upload has 20000 x 1"),
    ],
    ids=["empty", "text", "postscript", "cut", "fake", "huge", "strip"],
)
def test_what_is_no_picture_is_refused_in_one_line(picture_port, body, words):
    answer = ask(picture_port, "POST", "/picture", body)
    assert answer.status == 400
    assert words in answer.json["error"] and "/tmp" not in answer.json["error"]


def test_uploads_are_bounded_before_they_are_read(picture_port):
    headers = {"Content-Length": str(MOST_BYTES + 1)}
    assert ask(picture_port, "POST", "/picture", **headers).status == 413
    for length in ("-1", "many", "1_0"):
        headers = {"Content-Length": length}
        assert ask(picture_port, "POST", "/picture", **headers).status == 411, length
    chunked = {"Transfer-Encoding": "chunked"}
    assert ask(picture_port, "POST", "/picture", b"0\r\n\r\n", **chunked).status == 411


def test_pictures_on_their_way_are_bounded_in_number_and_time(picture_port, monkeypatch):
    """Others get one line; the slots are free again when the slow ones have gone."""
    head = (
        f"POST /picture HTTP/1.0\r\nHost: 127.0.0.1:{picture_port}\r\n"
        f"Content-Length: {MOST_BYTES}\r\n\r\n"
    )
    with ExitStack() as slow:
        for _ in range(MOST_UPLOADS):
            sender = slow.enter_context(socket.create_connection(("127.0.0.1", picture_port)))
            sender.sendall(head.encode() + b"begun")
        for _ in range(200):
            answer = ask(picture_port, "POST", "/picture", encoded("PNG"))
            if answer.status == 503:
                break
        assert (answer.status, list(answer.json)) == (503, ["error"])
        assert ask(picture_port, "GET", "/show").status == 200
    for _ in range(200):
        answer = ask(picture_port, "POST", "/picture", encoded("PNG"))
        if answer.status == 200:
            break
    assert answer.status == 200
    monkeypatch.setattr("sigmabranch.view.handler.UPLOAD_SECONDS", 0)
    assert ask(picture_port, "POST", "/picture", encoded("PNG")).status == 408


def test_connections_are_bounded(picture_port):
    with ExitStack() as held:
        for _ in range(MOST_CONNECTIONS + 1):
            last = socket.create_connection(("127.0.0.1", picture_port), timeout=TIMEOUT)
            held.enter_context(last)
        assert last.recv(1) == b""  # closed at once
    for _ in range(200):
        with suppress(ConnectionError, http.client.HTTPException):
            if ask(picture_port, "GET", "/show").status == 200:
                return
    raise AssertionError("the connections that have gone still count")


def test_without_data_there_are_no_samples(picture_port):
    told = ask(picture_port, "GET", "/show").json
    assert (told["samples"], told["pictures"]) == (0, True)
    assert ask(picture_port, "POST", "/samples/0").status == 404


# -- bad input -----------------------------------------------------------------------------------


def test_only_a_dense_network_stands_beside_another(digits):
    from sigmabranch.cli.view import _check_twins

    branched, dense = digits
    _check_twins([branched, dense])
    with pytest.raises(ConfigError, match="holds no dense network"):
        _check_twins([branched, branched])


def test_a_port_that_is_taken_is_named(picture_port):
    with pytest.raises(ConfigError, match=f"port {picture_port} cannot be had"):
        serve(None, picture_port)
