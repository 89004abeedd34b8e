"""Two connections, closed first by the server or by the client: `close_first.py server|client`."""

import socket
import sys

first = sys.argv[1]
with socket.create_server(("127.0.0.1", 9090)) as listener:
    for _ in range(2):
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        ends = (server, client) if first == "server" else (client, server)
        for end in ends:
            end.close()
