"""The web server around the application: uvicorn, with limits."""

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from piflow_edge.errors import MissingExtraError, UsageError

from .limits import ServeSettings

if TYPE_CHECKING:
    from piflow_edge.runtime.generator import Generator

# Connections that the system holds for a busy server, before it refuses more.
_BACKLOG = 512
# Seconds that a quiet connection is kept, and that answers may take once the server is to stop.
_KEEP_ALIVE, _LAST_ANSWERS = 15, 10
# Bytes of a request's head.
_LONGEST_HEAD = 16_384


def require_packages() -> None:
    """Raise MissingExtraError unless the `serve` extra is installed."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"a server needs {error.name!r}; get it with: pip install 'piflow-edge[serve]'"
        ) from error


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


def run_app(
    generators: Sequence["Generator"],
    limits: ServeSettings,
    listening: socket.socket,
    ready: Callable[[str], None],
    runtime: Path | None = None,
) -> None:
    """Serve bundles until the process is asked to stop by SIGINT or SIGTERM.

    Args:
        generators: of the bundles; the server closes them.
        limits: of the server.
        listening: of `open_socket`.
        ready: called with the server's address once it answers.
        runtime: as in `build_app`.
    """
    import uvicorn

    from .web_app import build_app

    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            if self.started:
                ready(address)

    config = uvicorn.Config(
        build_app(generators, limits, runtime),
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=limits.max_connections,
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=_LAST_ANSWERS,
        h11_max_incomplete_event_size=_LONGEST_HEAD,
        http="h11",
        ws="none",
    )
    Server(config).run(sockets=[listening])
