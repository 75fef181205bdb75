"""The verb serve as a real process: its answers, its refusals, and its page in a real browser."""

import base64
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import cv2
import numpy as np
import pytest
from browser import browser, resize, shot
from conftest import free_port
from factory import FINDINGS, SIZE, tiny_checkpoint
from pictures import dicom, encoded
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from infra.cli.app import run
from infra.serve.app import listen, make_app
from infra.serve.config import ServeConfig
from infra.serve.service import Service
from mpc.config import CalibrationInfo
from mpc.reference import FILE, Described, Reference
from pipeline import pixels
from pipeline.config import ExplainConfig, PredictConfig
from pipeline.decode import decode
from pipeline.inference import load_model
from pipeline.judge import Scale
from pipeline.overlay import blend

WAIT = 300  # seconds for what takes two on an idle machine
BYTES = {"Content-Type": "application/octet-stream"}
FITS = {name: CalibrationInfo(temperature=1.5, slope=2.0, shift=0.5) for name in FINDINGS}


class Reply(NamedTuple):
    """What the server said."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        """The reason of a refusal."""
        said = json.loads(self.body)
        assert list(said) == ["error"]
        assert "\n" not in said["error"]
        return str(said["error"])


class Server(NamedTuple):
    """A running `mpc-cxr serve`."""

    port: int
    checkpoint: Path

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One request."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body, {**(BYTES if method == "POST" else {}), **named})
            reply = connection.getresponse()
            return Reply(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())
        finally:
            connection.close()


def radiograph(index: int, side: int = 300) -> np.ndarray:
    """A synthetic one that no training has seen."""
    return pixels.load(f"phantom://dense/88/{index}", side, "pad")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves an untrained network that knows what synthetic radiographs are like; small limits."""
    folder = tmp_path_factory.mktemp("serve")
    checkpoint = folder / "best"
    tiny_checkpoint(checkpoint, thresholds={"Mass": 0.25, "Effusion": 0.9}, calibration=FITS)
    loaded, port = load_model(checkpoint), free_port()
    images = np.stack([pixels.load(f"phantom://dense/3/{index}", SIZE, "pad") for index in range(150)])
    seen = Described.of(loaded.outputs(images)[1], images)
    parts = [Described._make(column[part] for column in seen) for part in (slice(100), slice(100, None))]
    (checkpoint / FILE).write_bytes(Reference.of(*parts, 0.02).to_bytes())
    limits = {"port": port, "max_mib": 0.5, "timeout_s": 3, "max_requests": 8}
    settings = [part for name, value in limits.items() for part in ("--set", f"serve.{name}={value}")]
    command = [str(Path(sys.executable).with_name("mpc-cxr")), "serve", "--checkpoint", str(checkpoint), *settings]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        deadline = time.monotonic() + WAIT
        while "until Ctrl-C" not in (folder / "log.txt").read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail((folder / "log.txt").read_text()[-2000:])
            time.sleep(0.2)
        yield Server(port, checkpoint)
        process.send_signal(2)
        assert process.wait(WAIT) == 0, "Ctrl-C is how it ends"
        assert "Traceback" not in (folder / "log.txt").read_text()
    finally:
        process.kill()
        process.wait()


def test_findings_are_those_of_the_model(server: Server) -> None:
    image = radiograph(0)
    reply = server.ask("POST", "/findings", encoded(image))
    assert reply.status == 200
    found = json.loads(reply.body)
    loaded = load_model(server.checkpoint)
    seen = decode(encoded(image), "", SIZE, "pad")
    scale = Scale(loaded.info)
    expected = scale.probabilities(loaded.logits(seen[None]).astype(np.float64))[0]
    assert [row["finding"] for row in found["findings"]] == list(FINDINGS)
    np.testing.assert_allclose([row["probability"] for row in found["findings"]], expected, atol=1e-6)
    np.testing.assert_allclose([row["threshold"] for row in found["findings"]], scale.thresholds, atol=1e-12)
    assert all(row["positive"] == (row["probability"] >= row["threshold"]) for row in found["findings"])
    assert [row["flags"] for row in found["findings"]] == [[], [], ["default_threshold"]]
    kind, _, content = found["image"].partition(",")
    assert kind == "data:image/png;base64"
    shown = cv2.imdecode(np.frombuffer(base64.b64decode(content), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(shown, seen)
    about = json.loads(server.ask("GET", "/model").body)
    assert about["model_version"] == found["model_version"]
    assert about["max_mib"] == 0.5


def test_a_map_is_drawn_over_the_image(server: Server) -> None:
    reply = server.ask("POST", "/overlay?finding=Mass", encoded(radiograph(1)))
    assert (reply.status, reply.headers["content-type"]) == (200, "image/png")
    shown = cv2.cvtColor(cv2.imdecode(np.frombuffer(reply.body, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    seen = decode(encoded(radiograph(1)), "", SIZE, "pad")
    assert shown.shape == (SIZE, SIZE, 3)
    assert not np.array_equal(shown, blend(seen, np.zeros((2, 2), np.float32))), "there is evidence in it"
    refused = server.ask("POST", "/overlay?finding=Nothing", encoded(radiograph(1)))
    assert (refused.status, refused.error) == (404, "the model has no finding 'Nothing'")


def test_unlike_images_are_flagged(server: Server) -> None:
    like = json.loads(server.ask("POST", "/findings", encoded(radiograph(2))).body)
    negative = json.loads(server.ask("POST", "/findings", encoded(255 - radiograph(2))).body)
    file = dicom(radiograph(2), Modality="CT", ViewPosition="LL")
    other = json.loads(server.ask("POST", "/findings", file).body)
    assert (like["unlike_training"], like["flags"]) == (False, [])
    assert negative["flags"] == ["unlike_training", "inverted"]
    assert negative["unlikeness"] > 1 > like["unlikeness"]
    assert other["flags"] == ["other_modality", "lateral"]
    assert b"Doe" not in json.dumps(other).encode()


def bomb() -> bytes:
    """A small PNG that claims to be larger than any radiograph."""
    data = bytearray(encoded(np.zeros((8, 8), np.uint8)))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 400, "empty"),
        (b"MZ\x90 program", 415, "unsupported"),
        (b"\x80\x04\x95 pickle", 415, "unsupported"),
        (bomb(), 413, "too_large"),
        (encoded(np.full((20, 20), 7, np.uint8)), 422, "blank"),
        (encoded(np.random.default_rng(0).integers(0, 256, (48, 40), np.uint8))[:300], 422, "unreadable"),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(server: Server, body: bytes, status: int, reason: str) -> None:
    for path in ("/findings", "/overlay?finding=Mass"):
        reply = server.ask("POST", path, body)
        assert (reply.status, reply.error.partition(":")[0]) == (status, reason)


def test_an_answer_is_not_held_back_for_an_acknowledgement() -> None:
    config = ServeConfig(port=free_port())
    with listen(config) as door, socket.create_connection((config.host, config.port), WAIT):
        accepted, _ = door.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_limits(server: Server) -> None:
    long = b"\x89PNG\r\n\x1a\n" + bytes(600_000)
    assert server.ask("POST", "/findings", long).status == 413
    chunks = server.ask("POST", "/findings", iter([long[:300_000], long[:300_000]]))
    assert (chunks.status, chunks.error) == (413, "larger than 0.5 MiB (serve.max_mib)")
    head = f"POST /findings HTTP/1.1\r\nHost: localhost:{server.port}\r\nContent-Type: {BYTES['Content-Type']}\r\n"
    with ThreadPoolExecutor(1) as pool, socket.create_connection(("127.0.0.1", server.port), WAIT) as slow:
        slow.sendall(f"{head}Content-Length: 1000\r\n\r\nfirst bytes".encode())
        other = pool.submit(server.ask, "POST", "/findings", encoded(radiograph(3)))
        assert slow.recv(100).startswith(b"HTTP/1.1 408 "), "a file that never comes"
        assert other.result().status == 200, "nobody waits for it"


def test_an_answer_that_takes_too_long_is_given_up(server: Server) -> None:
    service = Service(server.checkpoint, PredictConfig(), ExplainConfig())
    app = make_app(service, ServeConfig(timeout_s=1))
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": encoded(radiograph(0)), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(dict(message))

    headers = [(b"host", b"localhost"), (b"content-type", BYTES["Content-Type"].encode())]
    scope = {"type": "http", "method": "POST", "path": "/findings", "headers": headers, "query_string": b""}
    with service.turn:  # somebody else's image is being looked at, for ever
        anyio.run(app, scope, receive, send)
    assert sent[0]["status"] == 503
    assert b"no answer within 1 s" in sent[1]["body"]


def test_other_sites_and_forms_are_kept_out(server: Server) -> None:
    image = encoded(radiograph(0))
    assert server.ask("POST", "/findings", image, Host="evil.example").status == 400
    assert server.ask("POST", "/findings", image, Content_Type="multipart/form-data").status == 415
    assert server.ask("OPTIONS", "/findings", Origin="http://evil.example").status == 405
    assert server.ask("GET", "/findings").status == 405
    assert server.ask("GET", "/../../etc/passwd").error == "Not Found"
    reply = server.ask("GET", "/")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert reply.headers["cache-control"] == "no-store"
    assert not re.findall(rb"(?:src|href)=.(?:https?:)?//", reply.body), "the page asks no other host"


def test_mistakes_of_the_one_who_starts_it(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["serve", "--checkpoint", str(server.checkpoint)]
    assert run([*start, "--set", f"serve.port={server.port}"]) == 2
    assert f"serve.port {server.port}: Address already in use; set another port" in capsys.readouterr().err
    assert run([*start, "--set", "serve.host=0.0.0.0"]) == 2
    assert "name it in serve.allowed_hosts, or keep 127.0.0.1" in capsys.readouterr().err
    assert run(["serve", "--checkpoint", str(tmp_path), "--set", f"serve.port={free_port()}"]) == 2
    assert "holds no checkpoint.json" in capsys.readouterr().err


def test_the_page_in_a_browser(server: Server, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(encoded(radiograph(4)))
    (tmp_path / "negative.dcm").write_bytes(dicom(255 - radiograph(4)))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "long.png").write_bytes(bytes(600_000))
    shots = Path(os.environ.get("MPC_CXR_SHOTS", tmp_path))
    with browser(tmp_path / "profile") as chrome:
        wait = WebDriverWait(chrome, WAIT)

        def shown(selector: str) -> str:
            return " ".join(
                part.text for part in chrome.find_elements(By.CSS_SELECTOR, selector) if part.is_displayed()
            )

        def give(name: str, until: str, text: str) -> None:
            chrome.find_element(By.ID, "file").send_keys(str(tmp_path / name))
            wait.until(lambda _: text in shown(until))

        resize(chrome, 1200, 900)
        chrome.get(f"http://127.0.0.1:{server.port}/")
        wait.until(lambda _: chrome.find_elements(By.CSS_SELECTOR, "body[data-ready]"))
        assert "Research use only, not for clinical decisions." in shown("header")
        assert "step-7-" in shown("#version")
        give("good.png", "#list", "Mass")
        assert not shown("#flags")
        probabilities = {row["finding"]: row for row in answer(server, tmp_path / "good.png")["findings"]}
        for button in chrome.find_elements(By.CSS_SELECTOR, "#list button"):
            row = probabilities[button.get_attribute("data-finding")]
            assert f"{row['probability']:.3f}" in button.text
            assert ("called" in button.get_attribute("class")) == row["positive"]
        plain = picture(chrome)
        chrome.find_element(By.CSS_SELECTOR, "#list button[data-finding=Mass]").click()
        wait.until(lambda _: "Evidence for Mass" in shown("#caption"))
        wait.until(lambda _: picture(chrome) is not None and np.ptp(picture(chrome).astype(int), axis=2).max() > 50)
        assert np.ptp(plain.astype(int), axis=2).max() == 0, "the image itself is grey"
        for width, name in ((1200, "desktop"), (390, "phone")):
            resize(chrome, width, 900)
            assert chrome.execute_script("return document.documentElement.scrollWidth") <= width
            shot(chrome, shots / f"serve-{name}.png")
        resize(chrome, 1200, 900)
        give("negative.dcm", "#flags", "Unlike the training images: do not rely on these findings.")
        assert "negative" in shown("#flags")
        shot(chrome, shots / "serve-unlike.png")
        resize(chrome, 1200, 900)
        give("notes.txt", "#error", "unsupported: neither PNG nor JPEG nor DICOM")
        assert not shown("#result, #flags"), "nothing of the file before is left"
        give("long.png", "#error", "too_large: more than 0.5 MiB")
        shot(chrome, shots / "serve-refused.png")
        failed = [entry["message"] for entry in chrome.get_log("browser") if entry["level"] == "SEVERE"]
        assert [line for line in failed if "status of 415" not in line] == [], "no script failed, no policy was broken"


def answer(server: Server, path: Path) -> dict[str, Any]:
    """What the server says about a file."""
    return dict(json.loads(server.ask("POST", "/findings", path.read_bytes()).body))


def picture(chrome: Any) -> np.ndarray | None:
    """Pixels of the picture as the browser shows them; None while it is loading."""
    script = """const image = document.getElementById("picture"), canvas = document.createElement("canvas");
    if (!image.complete || !image.naturalWidth) return null;
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL("image/png").split(",")[1];"""
    content = chrome.execute_script(script)
    if content is None:
        return None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))
