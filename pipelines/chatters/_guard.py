"""What stands before a server that others may reach: it wants a token, and lets through what a chat needs, no more.

    XTUNER_TOKEN=... python _guard.py HOST PORT UPSTREAM_PORT MODEL

`transformers serve` knows no token, LMDeploy takes its own from the argument list, where every user of the machine can read it, and
vLLM's leaves most addresses open. All three have more addresses than /v1 (load another model, sleep, new weights). So they listen on
loopback only, and this program answers outside.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

LOOPBACK = "127.0.0.1"
LONGEST_BODY = 2**20
MOST_CONNECTIONS = 256
TIMEOUT = httpx.Timeout(10, read=600)
"""Seconds; between two pieces of an answer, a request may wait behind others."""


def guard(upstream: str, model: str, token: str, hosts: Sequence[str]) -> Starlette:
    """The application before the server at `upstream`; `hosts` are the names it may be called by (`*`: any)."""
    client = httpx.AsyncClient(base_url=upstream, trust_env=False, timeout=TIMEOUT)

    async def health(request: Request) -> Response:
        try:
            return Response(status_code=(await client.get("/health")).status_code)
        except httpx.HTTPError:
            return Response(status_code=503)

    async def models(request: Request) -> Response:
        if not _may_enter(request, token):
            return _refusal(401, "send the token: Authorization: Bearer TOKEN")
        return JSONResponse({"object": "list", "data": [{"id": model, "object": "model", "created": 0, "owned_by": "xtuner"}]})

    async def relay(request: Request) -> Response:
        if not _may_enter(request, token):
            return _refusal(401, "send the token: Authorization: Bearer TOKEN")
        body = await _body(request)
        if body is None:
            return _refusal(413, f"longer than {LONGEST_BODY} bytes")
        asked = client.build_request("POST", request.scope["path"], content=body, headers={"Content-Type": "application/json"})
        try:
            answer = await client.send(asked, stream=True)
        except httpx.HTTPError as error:
            return _refusal(502, f"the model's server does not answer: {type(error).__name__}")
        return StreamingResponse(_pieces(answer), answer.status_code, media_type=answer.headers.get("content-type"))

    routes = [Route("/health", health), Route("/v1/models", models)]
    routes += [Route(path, relay, methods=["POST"]) for path in ("/v1/chat/completions", "/v1/completions")]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)])


def _may_enter(request: Request, token: str) -> bool:
    given = request.headers.get("authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {token}".encode())


def _refusal(status: int, why: str) -> JSONResponse:
    return JSONResponse({"error": {"message": why, "type": "invalid_request_error", "code": status}}, status)


async def _body(request: Request) -> bytes | None:
    """None if it is too long; no more of it is read then."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > LONGEST_BODY:
            return None
    return body


async def _pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    """As they come. A client that goes away ends the request to the server too."""
    try:
        async for piece in answer.aiter_bytes():
            yield piece
    finally:
        await answer.aclose()


def names_of(host: str) -> list[str]:
    """What a client may call us, against names that a foreign web page had pointed at us (DNS rebinding)."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return [host, "localhost", LOOPBACK]
    if address.is_unspecified or address.version == 6:  # reachable by every name of the machine; the token must do
        return ["*"]
    return [host, "localhost", LOOPBACK, socket.gethostname()]


if __name__ == "__main__":
    host, port, upstream_port, model = sys.argv[1:]
    application = guard(f"http://{LOOPBACK}:{upstream_port}", model, os.environ.pop("XTUNER_TOKEN"), names_of(host))
    uvicorn.run(application, host=host, port=int(port), access_log=False, log_level="warning", limit_concurrency=MOST_CONNECTIONS)
