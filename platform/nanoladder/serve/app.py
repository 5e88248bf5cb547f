"""The web application: OpenAI's chat interface, the model card, health, and the page. One per server process."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanoladder.serve.errors import ApiError
from nanoladder.serve.service import Reply, Service
from nanoladder.serve.wire import Answer, ChatRequest, parse_chat_request, sse, usage

PAGE_FILES = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript")}
PAGE_FILES |= {"/render.js": ("render.js", "text/javascript"), "/card.js": ("card.js", "text/javascript")}
HEADERS = {
    # The page runs its own files only, talks to its own server only, and lies in no other page's frame.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
SSE_HEADERS = {"X-Accel-Buffering": "no"}  # a proxy must not gather the pieces


def create_app(service: Service, *, api_key: str = "", allowed_hosts: tuple[str, ...] = ()) -> FastAPI:
    """`api_key`: asked for as a bearer token where anything but the page and health is meant. `allowed_hosts`: names under which
    the server answers (empty: all); on loopback this keeps other sites' pages from reaching it by a name of their own."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="nanoladder", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.service = service
    _add_errors(app)
    _add_page(app)
    _add_api(app, service)
    app.add_middleware(Guard, api_key=api_key)
    if allowed_hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    return app


class Guard:
    """Asks for the key where one is set, and puts the security headers on every answer."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app, self._api_key = app, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._api_key and path != "/healthz" and path not in PAGE_FILES and not _has_key(Request(scope), self._api_key):
            error = ApiError(401, "a valid API key is needed: Authorization: Bearer <key>", code="invalid_api_key")
            response = JSONResponse(error.body(), 401, headers={"WWW-Authenticate": "Bearer"})
            await response(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)


def _has_key(request: Request, api_key: str) -> bool:
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), api_key.encode())


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(_: Request, e: ApiError) -> JSONResponse:
        return JSONResponse(e.body(), e.status, headers=e.headers)

    @app.exception_handler(HTTPException)
    async def http(_: Request, e: HTTPException) -> JSONResponse:
        error = ApiError(e.status_code, str(e.detail), code="not_found" if e.status_code == 404 else "http_error")
        return JSONResponse(error.body(), e.status_code, headers=e.headers)

    @app.exception_handler(Exception)
    async def unknown(_: Request, e: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, f"internal error ({type(e).__name__})", code="internal_error").body(), 500)


def _add_page(app: FastAPI) -> None:
    folder = files("nanoladder.serve") / "page"
    for path, (name, kind) in PAGE_FILES.items():
        response = Response((folder / name).read_bytes(), media_type=f"{kind}; charset=utf-8")
        app.api_route(path, methods=["GET", "HEAD"])(_constant(response.body, response.media_type))


def _constant(body: bytes | memoryview, media_type: str | None) -> Callable[[], Response]:
    def respond() -> Response:
        return Response(body, media_type=media_type)

    return respond


def _add_api(app: FastAPI, service: Service) -> None:
    @app.get("/healthz")
    async def health() -> JSONResponse:
        alive = service.worker.alive
        return JSONResponse(
            {"status": "ok" if alive else "stopped", "model": service.name, **service.worker.status()}, 200 if alive else 503
        )

    @app.get("/card.json")
    async def card() -> JSONResponse:
        return JSONResponse(service.card)

    def model_facts() -> dict[str, Any]:
        return {"id": service.name, "object": "model", "created": service.card["created"], "owned_by": "nanoladder"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_facts()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise ApiError(404, f"no model {name!r} here; this server has {service.name!r}", code="model_not_found", param="model")
        return model_facts()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        wanted = parse_chat_request(await _read_body(request, service.options.max_body_bytes))
        reply = service.reply(wanted)
        if wanted.stream:
            return StreamingResponse(_stream(reply, wanted, service), media_type="text/event-stream", headers=SSE_HEADERS)
        return await _whole(reply, request, service)


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, of JSON by its header (a form on another site cannot send that) and not longer than `limit` bytes."""
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type {kind!r} must be application/json", code="unsupported_media_type")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise ApiError(413, f"the request is larger than {limit} bytes; shorten the conversation", code="request_too_large")
    return bytes(body)


async def _stream(reply: Reply, wanted: ChatRequest, service: Service) -> AsyncIterator[str]:
    """Server-sent events. When the client goes away this generator is closed, and the reply's row is free again."""
    answer = Answer(service.name, service.fingerprint)
    try:
        yield answer.piece({"role": "assistant", "content": ""}, dropped_messages=reply.prompt.dropped)
        async for piece in reply.pieces():
            if piece.text:
                yield answer.piece({"content": piece.text})
            if piece.finish:
                yield answer.piece({}, piece.finish)
                if wanted.stream_options is not None and wanted.stream_options.include_usage:
                    yield answer.usage_piece(usage(len(reply.prompt.ids), piece.num_tokens))
        yield "data: [DONE]\n\n"
    except ApiError as e:  # the status is sent already
        yield sse(e.body())
    finally:
        reply.close()


async def _whole(reply: Reply, request: Request, service: Service) -> Response:
    """The whole reply as one JSON object; given up when the client goes away."""

    async def collect() -> dict[str, Any]:
        parts = [piece async for piece in reply.pieces()]
        text, last = "".join(p.text for p in parts), parts[-1]
        counts = usage(len(reply.prompt.ids), last.num_tokens)
        return Answer(service.name, service.fingerprint).whole(text, str(last.finish), counts, reply.prompt.dropped)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(collect()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(await tasks[0])
    finally:
        for task in tasks:
            task.cancel()
        reply.close()
