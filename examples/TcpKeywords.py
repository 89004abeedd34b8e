"""A Robot Framework library over `timewait.Witness`, for `shutdown.robot` beside it."""

import socket
import socketserver
import threading
from typing import Literal

from timewait import Witness, hold_port


class _Echo(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


class TcpKeywords:
    ROBOT_LIBRARY_SCOPE = "TEST"

    def start_watching(self) -> None:
        self._port = hold_port()
        self._seen = Witness().__enter__()

    def stop_watching(self) -> None:
        self._seen.__exit__(None, None, None)
        self._port.release()

    def start_server(self) -> None:
        self._server = socketserver.ThreadingTCPServer(("", 0), _Echo, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = self._port.listen()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop_server(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def say(self, line: str) -> None:
        with socket.create_connection(("127.0.0.1", self._port.number)) as client:
            client.sendall(line.encode() + b"\n")
            assert client.recv(100).decode().strip() == line

    def should_be_closed_first_by(self, side: Literal["client", "server"]) -> None:
        self._seen.assert_closed_by(side, self._port)

    def nothing_should_be_left_open(self) -> None:
        self._seen.assert_no_leak()

    def port_should_be_free(self) -> None:
        self._seen.assert_bindable(self._port)
