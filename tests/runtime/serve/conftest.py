"""A server in this process, and an engine that waits until a test lets it go on."""

import threading
from contextlib import contextmanager

import pytest

import piflow_edge as pf
from piflow_edge.errors import EngineError
from tests.helpers.gaussian import GaussianEngine, gaussian_generator

# Only `localhost` is let in, and the test client calls itself "testserver".
ADDRESS = "http://localhost"


class GatedEngine(GaussianEngine):
    """Begins no network call until the gate is open; `begun` is released at the start of each."""

    def __init__(self, **more):
        super().__init__(**more)
        self.gate, self.begun, self.failing = threading.Event(), threading.Semaphore(0), False

    def run(self, inputs):
        self.begun.release()
        assert self.gate.wait(30)
        if self.failing:
            raise EngineError("the engine is out of order")
        return super().run(inputs)


@pytest.fixture
def gated():
    return GatedEngine()


@pytest.fixture
def generator(gated):
    with gaussian_generator(gated) as generator:
        yield generator
        gated.gate.set()


@pytest.fixture(scope="module")
def digits():
    with pf.load("digits") as generator:
        yield generator


def serve(*generators, **limits):
    """A client of a server of these bundles; a `with` block is the server's life."""
    from starlette.testclient import TestClient

    from piflow_edge.runtime.serve.limits import ServeSettings
    from piflow_edge.runtime.serve.web_app import build_app

    app = build_app(generators, ServeSettings(**limits))
    return TestClient(app, ADDRESS, raise_server_exceptions=False)


@contextmanager
def listen(*generators, **limits):
    """Where a real server of these bundles listens, in a thread of this process."""
    from piflow_edge.runtime.serve import web_server
    from piflow_edge.runtime.serve.limits import ServeSettings

    settings, ready = ServeSettings(port=0, **limits), threading.Event()
    with web_server.open_socket(settings) as opened:
        server = web_server.build_server(generators, settings, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        assert ready.wait(30)
        yield opened.getsockname()
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def client():
    with serve(pf.load("digits")) as client:
        yield client
