"""Two hosts and a bad day: the last ACK of a close is lost, then the server's host crashes."""

import asyncio

from timewait import sim
from timewait.events import SegmentSeen
from timewait.tcp.segment import flags_text


async def server():
    async def handle(reader, writer):
        writer.write(await reader.readline())
        await reader.read()
        writer.close()

    await (await asyncio.start_server(handle, None, 7)).serve_forever()


def show(event):
    match event:
        case SegmentSeen():
            lost = "  (lost)" if event.lost else ""
            arrow = "-->" if event.dst[1] == 7 else "<--"
            print(f"{event.t:8.3f}  {arrow} {flags_text(event.flags)}{lost}")
        case _:
            who = "server" if event.local[1] == 7 else "client"
            print(f"{event.t:8.3f}      {who}: {event.old} -> {event.new}")


async def main():
    network = sim.current_host().network
    network.hosts["web"].run(server())
    await asyncio.sleep(1)
    reader, writer = await asyncio.open_connection("web", 7)
    writer.write(b"echo\n")
    await reader.readline()

    network.drop("last-ack", source="client")
    with network.observe(show):
        writer.close()
        await asyncio.sleep(60.5)

    reader, writer = await asyncio.open_connection("web", 7)
    network.hosts["web"].crash()
    writer.write(b"are you there?\n")
    await asyncio.sleep(10)
    network.hosts["web"].reboot()  # whatever it is sent now is answered with a reset
    try:
        await reader.read()
    except ConnectionResetError as error:
        print(f"{asyncio.get_running_loop().time():8.3f}  {error!r}")
    writer.close()


sim.run(main, hosts=["client", "web"])
