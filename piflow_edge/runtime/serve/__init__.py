"""Images over HTTP: bundles kept open, requests put together into batches. Needs the `serve` extra."""

from piflow_edge.errors import MissingExtraError


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
