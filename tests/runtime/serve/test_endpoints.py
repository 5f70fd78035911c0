import asyncio
import base64
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="a server needs the 'serve' extra")
pytest.importorskip("prometheus_client", reason="a server needs the 'serve' extra")
pytest.importorskip("httpx2", reason="starlette's test client needs it")

from piflow_edge.errors import BundleError, UsageError
from piflow_edge.runtime.recipe import parse_recipe
from piflow_edge.runtime.serve.limits import ServeSettings
from piflow_edge.runtime.serve.web_app import build_app
from tests.helpers.gaussian import gaussian_generator
from tests.runtime.serve.conftest import ADDRESS, listen, serve


def pixels(picture) -> np.ndarray:
    content = base64.b64decode(picture) if isinstance(picture, str) else picture
    return np.asarray(Image.open(io.BytesIO(content)))


def read_events(text: str) -> list[tuple[str, dict]]:
    events = [block.split("\n") for block in text.split("\n\n") if block and not block.startswith(":")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in events]


class TestOpenAI:
    def test_a_prompt_and_a_seed_are_the_generators_images(self, client, digits):
        body = {"prompt": "3", "n": 2, "seed": 5, "model": "digits", "size": "8x8", "quality": "high"}
        answer = client.post("/v1/images/generations", json=body)
        expected = digits(labels=["3"], count=2, seed=5, output="numpy").images[..., 0]
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        for i, found in enumerate(answer.json()["data"]):
            np.testing.assert_array_equal(pixels(found["b64_json"]), expected[i])
            assert (found["seed"], found["index"]) == (5, i)

    def test_a_picture_can_be_fetched_by_its_address_and_holds_its_recipe(self, client, digits):
        body = {"prompt": "7", "seed": 1, "response_format": "url"}
        (found,) = client.post("/v1/images/generations", json=body).json()["data"]
        picture = client.get(found["url"])
        assert picture.headers["content-type"] == "image/png"
        recipe = parse_recipe(Image.open(io.BytesIO(picture.content)).info["piflow-edge"])
        again = digits.make_again(recipe, output="numpy").images[0, ..., 0]
        np.testing.assert_array_equal(pixels(picture.content), again)

    def test_only_the_last_pictures_are_kept(self, digits):
        body = {"prompt": "1", "response_format": "url"}
        with serve(gaussian_generator(), max_pictures=2) as client:
            urls = [
                client.post("/v1/images/generations", json=body).json()["data"][0]["url"] for _ in range(3)
            ]
            assert [client.get(url).status_code for url in urls] == [404, 200, 200]

    def test_without_a_seed_every_request_gets_another(self, client):
        seeds = {
            client.post("/v1/images/generations", json={"prompt": "1"}).json()["data"][0]["seed"]
            for _ in range(3)
        }
        assert len(seeds) == 3 and max(seeds) < 2**53

    @pytest.mark.parametrize("kind, name", [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
    def test_pictures_come_in_the_format_that_was_asked_for(self, client, kind, name):
        body = {"prompt": "1", "output_format": kind}
        (found,) = client.post("/v1/images/generations", json=body).json()["data"]
        assert Image.open(io.BytesIO(base64.b64decode(found["b64_json"]))).format == name

    def test_models_are_the_bundles(self, client):
        (model,) = client.get("/v1/models").json()["data"]
        assert (model["id"], model["object"]) == ("digits", "model")
        assert model["piflow"]["size"] == "8x8" and "0 to 9" in model["piflow"]["summary"]


class TestNative:
    def test_it_takes_all_that_steers_and_all_settings(self, client, digits):
        body = {
            "labels": [3, "7"], "seed": [[9, 4], 2], "nfe": 2, "substeps": 64,
            "solver": "multistep", "temperature": 0.5, "h": "inf", "bundle": "digits",
        }  # fmt: skip
        answer = client.post("/v1/generate", json=body).json()
        settings = {name: body[name] for name in ("nfe", "substeps", "solver", "temperature", "h")}
        expected = digits(labels=[3, "7"], seed=[(9, 4), (2, 0)], output="numpy", **settings)
        for i, found in enumerate(answer["images"]):
            np.testing.assert_array_equal(pixels(found["b64_json"]), expected.images[i, ..., 0])
            assert found["recipe"] == json.loads(expected.recipe.of(i).as_json())
        assert answer["engine"] == "ort-cpu" and answer["timings_ms"]["network"] > 0

    def test_events_tell_of_every_call_and_show_what_the_policy_sees(self, client, digits):
        body = {"labels": 3, "count": 2, "seed": 1, "nfe": 3, "stream": True, "previews": True}
        answer = client.post("/v1/generate", json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = read_events(answer.text)
        assert [name for name, _ in events] == ["progress"] * 3 + ["result"]
        seen = []
        result = digits(
            labels=3, count=2, seed=1, nfe=3, output="numpy", callback=lambda p: seen.append(p.x_0)
        )
        for call, (_, progress) in enumerate(events[:2]):
            assert (progress["call"], progress["nfe"], progress["first"]) == (call + 1, 3, 0)
            expected = digits.decode(seen[call])
            for i, preview in enumerate(progress["previews"]):
                np.testing.assert_array_equal(pixels(preview), expected[i, ..., 0])
        assert "previews" not in events[2][1]  # the result is next
        for i, found in enumerate(events[3][1]["images"]):
            np.testing.assert_array_equal(pixels(found["b64_json"]), result.images[i, ..., 0])

    def test_a_stream_that_cannot_begin_is_an_error_with_its_status(self, client):
        answer = client.post("/v1/generate", json={"labels": "eleven", "stream": True})
        assert answer.status_code == 400 and "eleven" in answer.json()["error"]["message"]

    def test_an_engine_that_fails_ends_the_stream_with_an_error(self, generator, gated):
        gated.failing = True
        gated.gate.set()
        with serve(generator) as client:
            text = client.post("/v1/generate", json={"labels": 1, "stream": True}).text
            assert client.post("/v1/generate", json={"labels": 1}).status_code == 500
        assert read_events(text) == [("error", {"message": "the engine is out of order"})]

    def test_a_silent_stream_shows_that_it_is_alive_and_ends_in_time(self, generator, gated, monkeypatch):
        monkeypatch.setattr("piflow_edge.runtime.serve.native_shape._SILENCE", 0.05)
        with serve(generator, timeout=0.3) as client:
            text = client.post("/v1/generate", json={"labels": 1, "stream": True}).text
            assert client.post("/v1/generate", json={"labels": 1}).status_code == 504
            gated.gate.set()
        assert text.startswith(": still at it") and "took above 0.3 s" in text


class TestTogether:
    def test_requests_that_come_together_get_the_images_that_they_get_alone(self, client, digits):
        def ask(seed):
            return client.post("/v1/images/generations", json={"prompt": str(seed % 10), "seed": seed}).json()

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(ask, range(48)))
        for seed, answer in enumerate(answers):
            expected = digits(labels=[seed % 10], seed=seed, output="numpy").images[0, ..., 0]
            np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), expected)
        batches = [
            line for line in client.get("/metrics").text.splitlines() if line.startswith("piflow_batch")
        ]
        count = next(float(line.split()[1]) for line in batches if "count" in line)
        total = next(float(line.split()[1]) for line in batches if "sum" in line)
        assert total > count  # some were drawn together

    def test_several_bundles_answer_by_their_names(self):
        import piflow_edge as pf

        with serve(pf.load("digits"), gaussian_generator()) as client:
            names = [model["id"] for model in client.get("/v1/models").json()["data"]]
            answers = {
                name: client.post("/v1/generate", json={"bundle": name, "labels": 1}).json() for name in names
            }
            default = client.post("/v1/generate", json={"labels": 1}).json()
        shapes = {name: pixels(answer["images"][0]["b64_json"]).shape for name, answer in answers.items()}
        assert shapes == {"digits": (8, 8), "gaussian": (4, 4)} and default["bundle"] == "digits"

    def test_bundles_of_one_name_or_without_images_are_refused(self):
        from piflow_edge.bundle.sections import LatentSpec

        with pytest.raises(UsageError, match="two bundles are called 'gaussian'"):
            build_app([gaussian_generator(), gaussian_generator()], ServeSettings())
        latents = gaussian_generator()
        object.__setattr__(latents.bundle.manifest, "latent", LatentSpec("latents", [1, 4, 4], 1.0, 0.0))
        with pytest.raises(BundleError, match="no decoder"):
            build_app([latents], ServeSettings())

    def test_too_many_are_told_when_to_come_again(self, generator, gated):
        with (
            serve(generator, max_batch=1, max_images=1, max_waiting=1) as client,
            ThreadPoolExecutor(2) as pool,
        ):
            first = pool.submit(client.post, "/v1/generate", json={"labels": 1})
            assert gated.begun.acquire(timeout=10)
            second = pool.submit(client.post, "/v1/generate", json={"labels": 1})
            while 'piflow_waiting_images{bundle="gaussian"} 1.0' not in client.get("/metrics").text:
                pass
            refused = client.post("/v1/generate", json={"labels": 1})
            gated.gate.set()
            assert first.result(10).status_code == second.result(10).status_code == 200
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"


def test_who_leaves_frees_the_place(generator, gated):
    """Straight through ASGI: the test client cannot hang up."""
    from starlette.testclient import TestClient

    app = build_app([generator], ServeSettings())
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/generate",
        "query_string": b"",
        "headers": headers,
    }
    body = {"type": "http.request", "body": b'{"labels": 1}', "more_body": False}
    sent, received = [], iter([body])

    async def receive():
        if message := next(received, None):
            return message
        await asyncio.to_thread(gated.begun.acquire, timeout=10)  # its batch is being drawn
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 499
    gated.gate.set()
    with TestClient(app, ADDRESS) as client:
        assert client.post("/v1/generate", json={"labels": 0, "nfe": 1}).status_code == 200
        assert 'piflow_abandoned_total{bundle="gaussian"} 1.0' in client.get("/metrics").text
    assert gated.sizes == [1, 1]  # of the first request's four calls one was made


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_on_a_real_server_frees_the_place(generator, gated, stream):
    body = json.dumps({"labels": 1, "stream": stream}).encode()
    head = "POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with listen(generator) as (host, port):
        with socket.create_connection((host, port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert gated.begun.acquire(timeout=10)  # it is being drawn
        counters = ""
        while 'piflow_abandoned_total{bundle="gaussian"} 1.0' not in counters:
            counters = urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10).read().decode()
        gated.gate.set()
    assert gated.sizes == [1]  # of four network calls the one that had begun


def test_health_says_when_nothing_is_drawn_any_more(generator):
    with serve(generator) as client:
        assert client.get("/healthz").json() == {"status": "ok", "bundles": ["gaussian"]}
    assert client.get("/healthz").status_code == 503


@pytest.fixture(scope="module")
def served():
    """The command, as docs/serve.md begins: its address."""
    command = [sys.executable, "-m", "piflow_edge.cli", "serve", "digits", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            yield address
        finally:
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors and "Generator 'digits'" in errors


@pytest.mark.skipif(shutil.which("curl") is None, reason="the page's commands are of curl")
def test_commands_of_the_page_work(served):
    page = (Path(__file__).parents[3] / "docs" / "serve.md").read_text(encoding="utf-8")
    commands = re.findall(r"^curl .*?[^\\]$", page, re.M | re.S)
    assert len(commands) == 2
    openai, native = (
        subprocess.run(
            ["sh", "-c", command.replace("http://127.0.0.1:8000", served)], capture_output=True, text=True
        ).stdout
        for command in commands
    )
    assert [image["seed"] for image in json.loads(openai)["data"]] == [5, 5]
    assert [name for name, _ in read_events(native)] == ["progress"] * 3 + ["result"]
