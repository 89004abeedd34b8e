"""The smallest application each Python server can serve: `/` answers at once, `/slow` in a second.

    python -m examples.apps http|socketserver|aiohttp PORT

uvicorn and hypercorn serve `asgi`, gunicorn serves `wsgi`; the others have no
command of their own that could serve a slow answer, so they are started here,
each with its defaults but for a keep-alive timeout of 1 s.
"""

from __future__ import annotations

import asyncio
import http.server
import socketserver
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

SLOW = 1.0  # seconds that an answer takes when asked to be slow
BODY = b"hello\n"


async def asgi(scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["path"] == "/slow":
        await asyncio.sleep(SLOW)
    length = [(b"content-length", str(len(BODY)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    await send({"type": "http.response.body", "body": BODY})


def wsgi(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
    if environ["PATH_INFO"] == "/slow":
        time.sleep(SLOW)
    start_response("200 OK", [("Content-Length", str(len(BODY)))])
    return [BODY]


class Web(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 1  # without it, an idle connection is kept for ever

    def do_GET(self) -> None:
        if self.path == "/slow":
            time.sleep(SLOW)
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


class Lines(socketserver.StreamRequestHandler):
    """A line is echoed; "slow" after a second; "bye" ends the connection."""

    timeout = 1

    def handle(self) -> None:
        try:
            for line in self.rfile:
                if line == b"slow\n":
                    time.sleep(SLOW)
                self.wfile.write(line)
                if line == b"bye\n":
                    return
        except TimeoutError:
            pass


def serve_aiohttp(port: int) -> None:
    from aiohttp import web

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/slow":
            await asyncio.sleep(SLOW)
        return web.Response(body=BODY)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    web.run_app(app, host="127.0.0.1", port=port, keepalive_timeout=1, print=None)


if __name__ == "__main__":
    what, port = sys.argv[1], int(sys.argv[2])
    if what == "aiohttp":
        serve_aiohttp(port)
    elif what == "http":
        http.server.ThreadingHTTPServer(("127.0.0.1", port), Web).serve_forever()
    else:
        socketserver.ThreadingTCPServer(("127.0.0.1", port), Lines).serve_forever()
