"""Errors as answers: JSON in the shape that clients of OpenAI's API read."""

import logging
import math

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from piflow_edge.errors import EngineError, PiFlowError

from .jobs import BusyError, StoppedError
from .orders import OrderError

log = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def answer_error(
    status: int, message: str, *, field: str | None = None, retry_after: int | None = None
) -> Response:
    """Return an error as JSON. `retry_after`: seconds after which to ask again."""
    fallback = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": _TYPES.get(status, fallback), "param": field, "code": None}
    headers = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}
    return JSONResponse({"error": error}, status, headers)


async def answer_order_error(request: Request, error: OrderError) -> Response:
    return answer_error(error.status, str(error), field=error.field)


async def answer_busy(request: Request, error: BusyError) -> Response:
    return answer_error(429, str(error), retry_after=error.retry_after)


async def answer_stop(request: Request, error: StoppedError) -> Response:
    return answer_error(503, str(error))


async def answer_engine_error(request: Request, error: EngineError) -> Response:
    return answer_error(500, str(error))


async def answer_refusal(request: Request, error: PiFlowError) -> Response:
    """What a generator refuses is the caller's to put right."""
    return answer_error(400, str(error))


async def answer_http_error(request: Request, error: HTTPException) -> Response:
    return answer_error(error.status_code, error.detail)


async def answer_fault(request: Request, error: Exception) -> Response:
    """A fault of ours: the log has it, the caller does not."""
    return answer_error(500, "the server failed; its log says why")


ERROR_ANSWERS = {
    OrderError: answer_order_error,
    BusyError: answer_busy,
    StoppedError: answer_stop,
    EngineError: answer_engine_error,
    PiFlowError: answer_refusal,
    HTTPException: answer_http_error,
    Exception: answer_fault,
}
