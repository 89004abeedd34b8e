"""Short connections between few addresses, so that most are begun out of a TIME_WAIT.

timewait exec python tests/check/address_reuse.py CONNECTIONS SEED

Who closes first, whether with text unread or a RST, and when, is chosen at random.
"""

from __future__ import annotations

import random
import socket
import struct
import sys
from threading import Thread

SERVER = ("127.0.0.1", 9090)
PORTS = range(40000, 40300)


def serve(peer: socket.socket, rng: random.Random) -> None:
    with peer:
        try:
            peer.recv(1)
            match rng.choices(("close", "answer", "abort", "wait"), (40, 20, 5, 35))[0]:
                case "answer":
                    peer.sendall(bytes(100))
                    peer.shutdown(socket.SHUT_WR)
                    peer.recv(10)
                case "abort":
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                case "wait":
                    while peer.recv(1000):
                        pass
        except OSError:
            pass


def accept(listener: socket.socket, rng: random.Random) -> None:
    while True:
        peer, _ = listener.accept()
        Thread(target=serve, args=(peer, random.Random(rng.random())), daemon=True).start()


def connect(times: int, rng: random.Random) -> None:
    for _ in range(times):
        with socket.socket() as client:
            client.settimeout(rng.choice((0.001, 0.01, 0.02, 0.05)))
            if rng.random() < 0.5:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                client.bind((SERVER[0], rng.choice(PORTS)))
                client.connect(SERVER)
                client.sendall(b"1" if rng.random() < 0.9 else b"12")
                first = rng.random()
                if first < 0.5:
                    client.shutdown(socket.SHUT_WR)
                while first > 0.4 and client.recv(1000):
                    pass
            except OSError:
                pass


if __name__ == "__main__":
    connections, seed = int(sys.argv[1]), int(sys.argv[2])
    rng = random.Random(seed)
    with socket.create_server(SERVER, backlog=512) as listener:
        Thread(target=accept, args=(listener, rng), daemon=True).start()
        clients = [
            Thread(target=connect, args=(connections // 8, random.Random(rng.random())))
            for _ in range(8)
        ]
        for each in clients:
            each.start()
        for each in clients:
            each.join()
