"""The port table against the kernel's: one combination in fifteen, and that a wrong rule shows."""

import asyncio
import errno
import json
import random
import socket

import pytest

from timewait import sim
from timewait.cli import main as timewait
from timewait.kernel.namespace import why_not
from timewait.lab import matrix
from timewait.sim import ports

WHY_NOT = why_not()
needs_namespace = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def some_cases(count: int) -> list[matrix.Case]:
    return random.Random("ports").sample(list(matrix.every_case()), count)


@needs_namespace
def test_kernel_and_model_agree_on_who_may_take_a_held_port(undisturbed):
    cases = some_cases(2500)
    model = matrix.on_model(cases)

    def agree():
        assert [
            f"{case}: kernel {theirs}, model {ours}"
            for case, theirs, ours in zip(cases, matrix.on_kernel(cases), model, strict=True)
            if theirs != ours
        ] == []

    undisturbed(agree)
    # All kinds of outcome are among them, so that agreement means something.
    assert {"ok", "bind: EADDRINUSE", "listen: EADDRINUSE", "connect: EADDRNOTAVAIL"} <= set(model)


@needs_namespace
def test_a_model_that_forgets_the_holders_option_is_found_out(monkeypatch):
    def only_the_newcomer_counts(self, bucket, new, relax, reuse_port_ok):
        return bool(set(bucket.owners) - {new}) and not new.reuse_address

    monkeypatch.setattr(ports.PortTable, "_conflict", only_the_newcomer_counts)
    cases = some_cases(300)
    assert matrix.on_kernel(cases) != matrix.on_model(cases)


def test_there_are_more_than_ten_thousand_combinations():
    cases = list(matrix.every_case())
    assert len(cases) == len(set(cases)) == 38_416


def test_the_command_prints_one_document(capsys, monkeypatch):
    cases = some_cases(200)
    monkeypatch.setattr(matrix, "every_case", lambda: iter(cases))
    with pytest.raises(SystemExit) as done:
        timewait(["matrix", "--on", "model", "--json"])
    assert done.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["cases"] == 200
    assert document["disagree"] == []
    assert document["agree"] is None  # one stack alone agrees with nobody


def test_the_table_is_printed_for_reading(capsys, monkeypatch):
    cases = [
        matrix.Case("time-wait-server", "127.0.0.1", held, "listen", "127.0.0.1", new)
        for held in matrix.OPTIONS
        for new in matrix.OPTIONS
    ]
    monkeypatch.setattr(matrix, "every_case", lambda: iter(cases))
    with pytest.raises(SystemExit):
        timewait(["matrix", "--on", "model"])
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("time-wait-server")
    )
    # The rule of the shared facts: both had SO_REUSEADDR, or both SO_REUSEPORT.
    assert line.split("  ")[1].strip() == "listen"
    assert line.split()[2:] == ["none", "A", "AP", "P", "AP", "A", "P", "AP"]


@pytest.mark.parametrize("remote", ["client", "server"])
@pytest.mark.parametrize("tw_reuse", [0, 1, 2])
def test_remembering_that_no_port_was_free_changes_no_choice(remote, tw_reuse):
    """Ports run out, TIME_WAITs end or become reusable, others are released meanwhile."""

    class Forgetful(dict):
        def get(self, key, default=None):
            return None

    def chosen(forgetful):
        network = sim.Network(seed=5)
        client = network.host("client", ephemeral=(20000, 20011), tw_reuse=tw_reuse)
        network.host("server")
        if forgetful:
            client.ports._full = Forgetful()
        dice = random.Random(tw_reuse)

        async def serve():
            loop = asyncio.get_running_loop()
            server = await loop.create_server(asyncio.Protocol, "0.0.0.0", 80)
            await server.serve_forever()

        async def main():
            serving = network.hosts[remote].run(serve())
            await asyncio.sleep(0.01)
            writers, found = [], []
            for _ in range(150):
                try:
                    _, writer = await asyncio.open_connection(remote, 80, family=socket.AF_INET)
                except OSError as error:
                    found.append(errno.errorcode[error.errno])
                else:
                    found.append(writer.get_extra_info("sockname")[1])
                    writers.append(writer)
                while writers and dice.random() < 0.4:
                    writer = writers.pop(dice.randrange(len(writers)))
                    dice.choice((writer.close, writer.transport.abort))()
                await asyncio.sleep(dice.choice((0, 0, 0.01, 0.6, 20)))
            for writer in writers:
                writer.close()
            await asyncio.sleep(0.01)
            serving.cancel()
            return found

        return sim.run(main, hosts=network)

    found = chosen(forgetful=False)
    assert found == chosen(forgetful=True)
    assert len(set(found)) == 13  # all twelve, and EADDRNOTAVAIL
