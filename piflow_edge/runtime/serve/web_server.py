"""The web server around the application: uvicorn, with limits."""

import asyncio
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from piflow_edge.errors import UsageError
from piflow_edge.runtime.generator import Generator

from .limits import ServeSettings
from .web_app import build_app

# Connections that the system holds for a busy server, before it refuses more.
_BACKLOG = 512
# Seconds that a quiet connection is kept, in which the head of a request must come, and that answers may take once the
# server is to stop.
_KEEP_ALIVE, _HEAD_SECONDS, _LAST_ANSWERS = 15, 15, 10
# Bytes of a request's head.
_LONGEST_HEAD = 16_384


class ImpatientProtocol(H11Protocol):
    """Closes connections on which the head of a request does not come in time.

    A few hundred of them, which cost nothing, would fill the server else.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Begin to count where no request is being answered, and nothing is counted yet."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(_HEAD_SECONDS, self._give_up)

    def _forget(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Server(uvicorn.Server):
    """Calls `ready` once it answers."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def open_socket(limits: ServeSettings) -> socket.socket:
    """Return a socket that listens where the settings say.

    Raises:
        UsageError: it cannot, such as for a port that another program has.
    """
    family = socket.AF_INET6 if ":" in limits.host else socket.AF_INET
    try:
        return socket.create_server((limits.host, limits.port), family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot listen on {limits.host}, port {limits.port}: {reason}; --port 0 takes a free one"
        ) from error


def name_address(listening: socket.socket) -> str:
    """Return the address of a server that listens on a socket, for a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def build_server(
    generators: Sequence[Generator],
    limits: ServeSettings,
    ready: Callable[[], None],
    runtime: Path | None = None,
) -> Server:
    """Return the server of bundles. Its `run(sockets=[...])` ends when the process gets SIGINT or SIGTERM.

    Args:
        generators: of the bundles; the server closes them.
        limits: of the server.
        ready: called once it answers.
        runtime: as in `build_app`.
    """
    config = uvicorn.Config(
        build_app(generators, limits, runtime),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=limits.max_connections,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_LAST_ANSWERS,
        h11_max_incomplete_event_size=_LONGEST_HEAD,
        http=ImpatientProtocol,
        ws="none",
    )
    return Server(config, ready)
