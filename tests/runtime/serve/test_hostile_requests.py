"""What a server must not take: each is refused with a clear status, and the server goes on."""

import socket
import time

import pytest

pytest.importorskip("starlette", reason="a server needs the 'serve' extra")
pytest.importorskip("prometheus_client", reason="a server needs the 'serve' extra")
pytest.importorskip("httpx2", reason="starlette's test client needs it")

from piflow_edge.errors import UsageError
from piflow_edge.runtime.serve.limits import ServeSettings
from tests.helpers.gaussian import gaussian_generator
from tests.runtime.serve.conftest import listen, serve

JSON = {"Content-Type": "application/json"}
KEY = "0123456789abcdef-key"

BODIES = {
    "no JSON": b"{",
    "no object": b"[]",
    "not UTF-8": b'{"labels": "\xff\xfe"}',
    "half a character": b'{"prompt": "\\ud800"}',
    "deeply nested": b'{"labels": ' + b"[" * 30_000,
    "deeply nested and whole": b'{"labels": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "NaN": b'{"labels": 1, "temperature": NaN}',
    "infinity": b'{"labels": 1, "h": 1e999}',
    "a number of 50,000 digits": b'{"labels": 1, "seed": ' + b"9" * 50_000 + b"}",
    "a seed above 64 bits": b'{"labels": 1, "seed": 18446744073709551616}',
    "a seed that is True": b'{"labels": 1, "seed": true}',
    "a fraction of an image": b'{"labels": 1, "count": 1.5}',
    "a million images": b'{"labels": 1, "count": 1000000}',
    "a range of a billion classes": b'{"labels": "0-999999999"}',
    "all classes, many times": b'{"labels": ["all", "all"], "count": 10}',
    "a long label": b'{"labels": "' + b"all," * 1000 + b'"}',
    "no images": b'{"labels": []}',
    "a million calls": b'{"labels": 1, "nfe": 1000000}',
    "a billion substeps": b'{"labels": 1, "substeps": 1000000000}',
    "another size": b'{"labels": 1, "height": 65536, "width": 65536}',
    "a solver that is a list": b'{"labels": 1, "solver": ["euler"]}',
    "an unknown field": b'{"labels": 1, "callback": "os.system"}',
    "a file for an image": b'{"labels": 1, "image": "/etc/passwd"}',
    "arrays": b'{"arrays": {"labels": [1]}}',
    "prompts where there are classes": b'{"prompt": "a red apple"}',
    "nothing": b"{}",
    "stream is 1": b'{"labels": 1, "stream": 1}',
    "seeds of another count": b'{"labels": [1, 2], "seed": [1]}',
    "a seed of three": b'{"labels": [1], "seed": [[1, 2, 3]]}',
    "a seed of one": b'{"labels": [1], "seed": [[1]]}',
}


@pytest.fixture(scope="module")
def client():
    with serve(gaussian_generator(class_names=tuple("0123456789"))) as client:
        yield client


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_bodies_that_make_no_sense(client, body):
    began = time.perf_counter()
    answer = client.post("/v1/generate", content=body, headers=JSON)
    assert answer.status_code == 400, answer.text
    assert 0 < len(answer.json()["error"]["message"]) < 1000
    assert time.perf_counter() - began < 5
    assert client.post("/v1/generate", json={"labels": 1}).status_code == 200


def test_a_field_of_another_library_is_answered_with_ours(client):
    answer = client.post("/v1/generate", json={"labels": 1, "num_inference_steps": 2})
    assert (
        answer.status_code == 400 and "'num_inference_steps'; give nfe" in answer.json()["error"]["message"]
    )


@pytest.mark.parametrize(
    "body",
    [{"prompt": ["1"]}, {"prompt": "1", "n": 11}, {"prompt": "1", "size": "8"}, {"prompt": "1", "size": "9x9"},
     {"prompt": "1", "stream": True}, {"prompt": "1", "response_format": "file"}, {"prompt": "x" * 5000}, {}],
    ids=repr,
)  # fmt: skip
def test_bodies_in_openais_shape_that_make_no_sense(client, body):
    answer = client.post("/v1/images/generations", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_other_types_of_content(client):
    """A form of another web site can send these without asking first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = client.post("/v1/generate", content=b'{"labels": 1}', headers={"Content-Type": kind})
        assert answer.status_code == 415


def test_a_body_that_is_too_large(client):
    assert client.post("/v1/generate", content=b" " * 70_000, headers=JSON).status_code == 413

    def endless():
        for _ in range(100):
            yield b" " * 65_536

    assert client.post("/v1/generate", content=endless(), headers=JSON).status_code == 413


def test_a_page_that_gives_this_machine_another_name(client):
    """DNS rebinding: the browser believes that it speaks to the page's own site."""
    for name in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io"):
        assert client.post("/v1/generate", json={"labels": 1}, headers={"Host": name}).status_code == 400


def test_unknown_paths_methods_and_bundles(client):
    assert client.get("/v1/generate").status_code == 405
    assert client.get("/v1/images/files/../../../etc/passwd").status_code == 404
    assert client.get("/v1/images/files/%2e%2e%2f%2e%2e%2fetc%2fpasswd").status_code == 404
    assert client.post("/v1/generate", json={"bundle": "../digits", "labels": 1}).status_code == 404
    counters = client.get("/metrics").text
    assert 'endpoint="none",status="404"' in counters and "passwd" not in counters


def test_without_the_key_nobody_comes_in():
    with serve(gaussian_generator(), api_key=KEY) as client:
        for wrong in ({}, {"Authorization": "Bearer"}, {"Authorization": f"Basic {KEY}"},
                      {"Authorization": f"Bearer {KEY}x"}, {"Authorization": f"Bearer {KEY[:-1]}"},
                      {"Authorization": "Bearer \u00e9".encode("latin-1")}):  # fmt: skip
            answer = client.post("/v1/generate", json={"labels": 1}, headers=wrong)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert client.get("/metrics", headers=wrong).status_code == 401
        right = {"Authorization": f"Bearer {KEY}"}
        assert client.post("/v1/generate", json={"labels": 1}, headers=right).status_code == 200
        assert client.get("/healthz").status_code == 200


def test_the_key_shows_in_no_text_of_the_settings():
    assert KEY not in repr(ServeSettings(api_key=KEY))


def test_a_body_that_does_not_come(monkeypatch):
    monkeypatch.setattr("piflow_edge.runtime.serve.orders._BODY_SECONDS", 0.1)

    async def never():
        import anyio

        yield b"{"
        await anyio.sleep(5)

    import httpx2
    from anyio.from_thread import start_blocking_portal

    from piflow_edge.runtime.serve.web_app import build_app

    app = build_app([gaussian_generator()], ServeSettings())

    async def post():
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/generate", content=never(), headers=JSON)

    with start_blocking_portal() as portal:
        assert portal.call(post).status_code == 408


@pytest.mark.parametrize(
    "settings, reason",
    [(dict(port=70_000), "port"), (dict(max_images=20, max_batch=16), "one batch"), (dict(timeout=0), "timeout"),
     (dict(api_key="short"), "16 characters"), (dict(api_key="é" * 20), "ASCII")],
    ids=["port", "images", "timeout", "short key", "key"],
)  # fmt: skip
def test_settings_that_contradict_each_other(settings, reason):
    with pytest.raises(UsageError, match=reason):
        ServeSettings(**settings)


def test_only_this_machine_is_let_in_unless_told():
    assert ServeSettings().is_local and ServeSettings().host_names == ["127.0.0.1", "localhost"]
    assert ServeSettings(host="0.0.0.0").host_names == ["*"]
    assert ServeSettings(host="0.0.0.0", allowed_hosts=("images.example",)).host_names == ["images.example"]


def test_a_port_that_is_taken_is_named():
    from piflow_edge.runtime.serve.web_server import open_socket

    with open_socket(ServeSettings(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port}"):
            open_socket(ServeSettings(port=port))
        assert taken.family is socket.AF_INET


@pytest.fixture
def listening(monkeypatch):
    """A real server that waits 0.3 s for the head of a request."""
    monkeypatch.setattr("piflow_edge.runtime.serve.web_server._HEAD_SECONDS", 0.3)
    with listen(gaussian_generator(), max_connections=4) as place:
        yield place


def read_to_the_end(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection; TimeoutError if it does not."""
    connection.settimeout(10)
    return b"".join(iter(lambda: connection.recv(4096), b""))


def test_connections_that_send_no_head_are_closed(listening):
    """Else a few hundred of them, which cost nothing, would keep everybody out."""
    silent, slow, after = (socket.create_connection(listening) for _ in range(3))
    slow.sendall(b"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
    after.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"200 OK" in after.recv(4096)
    after.sendall(b"GET /heal")  # the head of a second request
    answers = [read_to_the_end(connection) for connection in (silent, slow, after)]
    assert answers[:2] == [b"", b""] and b"HTTP" not in answers[2]
    for connection in (silent, slow, after):
        connection.close()


def test_a_head_that_does_not_end_is_refused(listening):
    with socket.create_connection(listening) as connection:
        connection.settimeout(10)
        connection.sendall(b"GET /healthz HTTP/1.1\r\nX-Long: " + b"x" * 100_000)
        assert b"400 Bad Request" in connection.recv(4096)


def test_more_connections_than_allowed_are_refused(listening):
    held = [socket.create_connection(listening) for _ in range(4)]
    for connection in held:
        connection.sendall(b"GET ")
    with socket.create_connection(listening) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        connection.settimeout(10)
        assert b"503" in connection.recv(4096)
    for connection in held:
        connection.close()
