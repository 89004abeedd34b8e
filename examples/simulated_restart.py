"""A server's restart, tested in virtual time: the server knows nothing of the simulation."""

import asyncio
import errno
import socket

from timewait import sim


async def serve(port: int) -> asyncio.Server:
    """Somebody's server. It makes its own socket and does not set SO_REUSEADDR."""
    listener = socket.socket()
    try:
        listener.bind(("", port))
    except OSError:
        listener.close()
        raise

    async def handle(reader, writer):
        writer.write(b"hello, " + await reader.readline())
        writer.close()  # the server closes first

    return await asyncio.start_server(handle, sock=listener)


async def main():
    host = sim.current_host()
    clock = asyncio.get_running_loop().time

    server = await serve(9090)
    reader, writer = await asyncio.open_connection("localhost", 9090, family=socket.AF_INET)
    writer.write(b"world\n")
    print((await reader.read()).decode(), end="")
    writer.close()
    server.close()
    await asyncio.sleep(1)

    for row in host.rows(port=9090):
        print(f"{row.local[1]} -> {row.remote[1]} {row.state}, {row.seconds_left:.3f} s left")

    while True:
        try:
            server = await serve(9090)
        except OSError as error:
            print(f"at {clock():6.3f} s: {errno.errorcode[error.errno]}")
            await asyncio.sleep(29.75)
        else:
            print(f"at {clock():6.3f} s: started again")
            server.close()
            return


sim.run(main, seed=1)
