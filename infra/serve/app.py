"""The web server around a model (Starlette on uvicorn, which MLflow brings): one page, two questions, short answers."""

import base64
import hashlib
import re
import socket
from collections.abc import Callable
from importlib.resources import files
from typing import Any, TypeVar

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.serve.config import ServeConfig
from infra.serve.service import Service
from mpc.errors import UserError
from pipeline.decode import DecodeError, Reason

BYTES = "application/octet-stream"
"""The only type that is taken: a form of another site cannot send it without asking first, and is then refused."""
READ_ON = 8
"""Times the limit: more than that is no mistake."""
STATUS: dict[Reason, int] = {"empty": 400, "unsupported": 415, "too_large": 413}
"""All other reasons are 422: the file is understood and cannot be used."""

Answer = TypeVar("Answer")


def make_app(service: Service, config: ServeConfig) -> Starlette:
    """The application: `/` the page, `/model`, `/findings` and `/overlay?finding=NAME`, both POST of a file's bytes."""
    text = files("infra.serve").joinpath("page.html").read_text(encoding="utf-8")

    async def page(request: Request) -> Response:
        return HTMLResponse(text)

    async def model(request: Request) -> Response:
        return JSONResponse({**service.about(), "max_mib": config.max_mib})

    async def findings(request: Request) -> Response:
        data = await _body(request, config)
        return JSONResponse(await _answered(lambda: service.findings(data), config))

    async def overlay(request: Request) -> Response:
        finding = request.query_params.get("finding", "")
        data = await _body(request, config)
        return Response(await _answered(lambda: service.overlay(data, finding), config), media_type="image/png")

    return Starlette(
        routes=[
            Route("/", page),
            Route("/model", model),
            Route("/findings", findings, methods=["POST"]),
            Route("/overlay", overlay, methods=["POST"]),
        ],
        middleware=[
            Middleware(_Headers, policy=content_policy(text)),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(config.allowed_hosts), www_redirect=False),
        ],
        exception_handlers={HTTPException: _refused},
    )


def content_policy(page: str) -> str:
    """What the page may do: run its own script and style, ask this server, show images that it was given."""
    hashes = {
        kind: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"
            for inner in re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        )
        for kind in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src data: blob:; "
        f"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Headers:
    """Adds headers to every answer that keep browsers from doing more with it than showing it, or keeping it.

    Args:
        app: what is inside.
        policy: Content-Security-Policy.
    """

    def __init__(self, app: ASGIApp, policy: str) -> None:
        self.app = app
        self.headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        await self.app(scope, receive, with_headers)


async def _body(request: Request, config: ServeConfig) -> bytes:
    """The file in a request; one that is too long is read on for a while, for closing early would lose the answer."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != BYTES:
        raise HTTPException(415, f"send the file's bytes as {BYTES}")
    limit, data, seen = int(config.max_mib * 2**20), bytearray(), 0
    try:
        with anyio.fail_after(config.timeout_s):
            async for chunk in request.stream():
                seen += len(chunk)
                if seen <= limit:
                    data += chunk
                elif seen > READ_ON * limit:
                    break
    except TimeoutError:
        raise HTTPException(408, f"the file did not arrive within {config.timeout_s:g} s (serve.timeout_s)") from None
    except ClientDisconnect:
        raise HTTPException(400, "the connection was closed before the file had arrived") from None
    if seen > limit:
        raise HTTPException(413, f"larger than {config.max_mib:g} MiB (serve.max_mib)")
    return bytes(data)


async def _answered(ask: Callable[[], Answer], config: ServeConfig) -> Answer:
    """What the model says, from a thread, so that others are answered meanwhile."""
    try:
        with anyio.fail_after(config.timeout_s):
            return await anyio.to_thread.run_sync(ask, abandon_on_cancel=True)
    except TimeoutError:
        raise HTTPException(503, f"no answer within {config.timeout_s:g} s; try again (serve.timeout_s)") from None
    except DecodeError as error:
        raise HTTPException(STATUS.get(error.reason, 422), str(error)) from None
    except KeyError as error:
        raise HTTPException(404, f"the model has no finding {error}") from None


async def _refused(request: Request, error: Exception) -> Response:
    """A refusal as JSON with its reason in one line."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


def listen(config: ServeConfig) -> socket.socket:
    """The socket, before a model is loaded for it.

    Raises:
        UserError: the port is taken, or the address is none of this machine's.
    """
    try:
        door = socket.create_server((config.host, config.port))
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise UserError(f"serve.host {config.host}, serve.port {config.port}: {reason}; set another port") from None
    # connections inherit it: else the body of an answer waits 40 ms for the other side's word on its head
    door.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return door


def serve(service: Service, config: ServeConfig, door: socket.socket, *, verbose: bool = False) -> None:
    """Answers until Ctrl-C or SIGTERM, then finishes what it has begun."""
    options: dict[str, Any] = {"access_log": verbose, "log_level": "info" if verbose else "warning"}
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(service, config),
            limit_concurrency=config.max_requests,
            server_header=False,
            timeout_graceful_shutdown=int(config.timeout_s) + 1,
            **options,
        )
    )
    try:
        server.run(sockets=[door])
    except KeyboardInterrupt:  # uvicorn raises it anew once it has ended in good order
        return
