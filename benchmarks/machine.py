"""The machine: lifecycles beside the kernel's own, the table's walk, TIME_WAIT by the million."""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

from benchmarks import Figure, side_by_side
from timewait.kernel.namespace import Namespace
from timewait.tcp.connection import Connection
from timewait.tcp.explorer import WORLDS, explore
from timewait.tcp.profiles import Profile, profile
from timewait.tcp.states import CLOSED, TIME_WAIT, Event, State
from timewait.tcp.time_wait import TimeWaits

RFC = profile("rfc9293")
PLAIN = profile("rfc9293", timestamps=False)
LINUX = profile("linux")
Hook = Callable[[State, State, Event, float], None] | None


def lifecycle(now: float, hook: Hook = None, stack: Profile = PLAIN) -> Connection:
    """SYN; SYN,ACK; ACK; FIN,ACK; ACK; FIN,ACK; ACK: the client is left in TIME_WAIT."""
    client = Connection(stack, iss=1)
    server = Connection(stack, iss=2)
    if hook is not None:
        client.on_transition = server.on_transition = hook
    to_server, to_client = client.out, server.out
    server.open_passive(now)
    client.open_active(now)
    server.segment(to_server.pop(), now)
    client.segment(to_client.pop(), now)
    server.segment(to_server.pop(), now)
    client.close(now)
    server.segment(to_server.pop(), now)
    client.segment(to_client.pop(), now)
    server.close(now)
    client.segment(to_client.pop(), now)
    server.segment(to_server.pop(), now)
    assert client.state is TIME_WAIT
    assert server.state is CLOSED
    return client


def silent(n: int) -> None:
    for _ in range(n):
        lifecycle(0.0).expire(240.0)


def with_timestamps(n: int) -> None:
    for _ in range(n):
        lifecycle(0.0, stack=RFC).expire(240.0)


def recorded(n: int) -> None:
    record: list[tuple[State, State, Event, float]] = []

    def note(old: State, new: State, event: Event, now: float) -> None:
        record.append((old, new, event, now))

    for _ in range(n):
        lifecycle(0.0, note).expire(240.0)
    assert len(record) == 12 * n


def kernel(listener: socket.socket) -> Callable[[int], None]:
    address = listener.getsockname()

    def work(n: int) -> None:
        for _ in range(n):
            client = socket.create_connection(address)
            server, _ = listener.accept()
            client.close()
            server.close()

    return work


def kernel_bare(listener: socket.socket) -> Callable[[int], None]:
    """The same without `create_connection`, which looks the address up each time."""
    address = listener.getsockname()

    def work(n: int) -> None:
        for _ in range(n):
            client = socket.socket()
            client.connect(address)
            server, _ = listener.accept()
            client.close()
            server.close()

    return work


# An active and a passive close, as states and events: what the walks below walk.
PATH = [
    (State.CLOSED, Event.OPEN_ACTIVE),
    (State.SYN_SENT, Event.SYN_ACK),
    (State.ESTABLISHED, Event.SHUTDOWN),
    (State.FIN_WAIT_1, Event.ACK_OF_FIN),
    (State.FIN_WAIT_2, Event.FIN),
    (State.TIME_WAIT, Event.TIME_WAIT_OVER),
]


def walk_ours(n: int) -> None:
    Connection(RFC, iss=0)  # compiles the table
    start = RFC.compiled[State.CLOSED]
    events = [int(event) for _, event in PATH]
    for _ in range(n // len(events)):
        cells = start
        for event in events:
            _, cells, _, _ = cells[event]
        assert cells is start


def walk_dict(n: int) -> None:
    table: dict[State, dict[Event, State]] = {}
    for state, event in PATH:
        following = RFC.table[state, event].next
        assert following is not None
        table.setdefault(state, {})[event] = following
    events = [event for _, event in PATH]
    for _ in range(n // len(events)):
        state = State.CLOSED
        for event in events:
            state = table[state][event]
        assert state is State.CLOSED


def walk_transitions() -> Callable[[int], None] | None:
    try:
        from transitions import Machine
    except ImportError:
        return None
    machine = Machine(states=[state.name for state in State], initial="CLOSED")
    for state, event in PATH:
        following = RFC.table[state, event].next
        assert following is not None
        machine.add_transition(event.name.lower(), state.name, following.name)

    def work(n: int) -> None:
        for _ in range(n // len(PATH)):
            for _, event in PATH:
                machine.trigger(event.name.lower())
        assert machine.state == "CLOSED"

    return work


def walk_python_statemachine() -> Callable[[int], None] | None:
    try:
        from statemachine import State as Place
        from statemachine import StateMachine
    except ImportError:
        return None
    places = {state: Place(state.name, initial=state is State.CLOSED) for state in dict(PATH)}
    members: dict[str, object] = {place.name: place for place in places.values()}
    for state, event in PATH:
        following = RFC.table[state, event].next
        assert following is not None
        members[event.name.lower()] = places[state].to(places[following])
    machine = type("Walk", (StateMachine,), members)()

    def work(n: int) -> None:
        for _ in range(n // len(PATH)):
            for _, event in PATH:
                machine.send(event.name.lower())

    return work


def walk_automat() -> Callable[[int], None] | None:
    try:
        from automat import MethodicalMachine
    except ImportError:
        return None
    machine = MethodicalMachine()

    def nothing(self: object) -> None:
        """The state or input, which automat wants as a method."""

    def member(name: str) -> Callable[[object], None]:
        method = type(nothing)(nothing.__code__, {}, name)
        method.__doc__ = name
        return method

    places = {
        state: machine.state(initial=state is State.CLOSED)(member(state.name))
        for state in dict(PATH)
    }
    inputs = {event: machine.input()(member(event.name.lower())) for _, event in PATH}
    for state, event in PATH:
        following = RFC.table[state, event].next
        assert following is not None
        places[state].upon(inputs[event], enter=places[following], outputs=[])
    members = {event.name.lower(): made for event, made in inputs.items()}
    walk = type("Walk", (), {"machine": machine, **members})()

    def work(n: int) -> None:
        for _ in range(n // len(PATH)):
            for _, event in PATH:
                getattr(walk, event.name.lower())()

    return work


def standing(count: int) -> tuple[TimeWaits[tuple[str, int, str, int]], float]:
    """`count` connections in TIME_WAIT, and how many bytes each takes, its key included."""
    from tracemalloc import get_traced_memory, start, stop

    connection = lifecycle(0.0)
    connection.profile = LINUX
    waits = TimeWaits[tuple[str, int, str, int]](LINUX)
    here, there = "192.0.2.1", "198.51.100.7"
    gc.collect()
    start()
    before, _ = get_traced_memory()
    for number in range(count):
        connection.t_wait = 60.0 + number * 1e-5
        waits.add((here, 9090, there, number), connection)
    after, _ = get_traced_memory()
    stop()
    return waits, (after - before) / count


def cost_beside(waits: TimeWaits[tuple[str, int, str, int]], n: int) -> float:
    """Seconds for one lifecycle that leaves a TIME_WAIT and sees the oldest one expire.

    The least of several rounds: what stands beside it must not matter.
    """
    key = len(waits)
    best = float("inf")
    gc.collect()
    gc.disable()
    for _ in range(7):
        begun = time.perf_counter()
        for _ in range(n):
            now = waits.deadline or 0.0
            assert len(waits.expire(now)) == 1
            connection = lifecycle(now)
            connection.t_wait = now + 60.0
            key += 1
            waits.add(("192.0.2.1", 9090, "198.51.100.7", key), connection)
        best = min(best, (time.perf_counter() - begun) / n)
    gc.enable()
    return best


def measure(quick: bool) -> Iterator[Figure]:
    n, rounds = (100, 9) if quick else (200, 41)
    with ExitStack() as resources:
        namespace = resources.enter_context(Namespace())
        listener = resources.enter_context(namespace.socket(socket.AF_INET))
        with namespace.entered():
            listener.setblocking(True)
            listener.bind(("127.0.0.1", 0))
            listener.listen(64)
            # Each for about as long, so that what interrupts them takes a like share of each.
            ours, stamped, noted, theirs, bare = side_by_side(
                (silent, 4 * n),
                (with_timestamps, 4 * n),
                (recorded, 4 * n),
                (kernel(listener), n),
                (kernel_bare(listener), n),
                rounds=rounds,
            )
    peer = "kernel, loopback"
    yield Figure("lifecycle, seven segments", ours, "/s", peer, theirs, 3)
    yield Figure("lifecycle, timestamps on", stamped, "/s", peer, theirs)
    yield Figure("lifecycle, transitions recorded", noted, "/s", peer, theirs, 1.5)
    peer = "kernel, no create_connection()"
    yield Figure("lifecycle, seven segments", ours, "/s", peer, bare)
    yield Figure("lifecycle, transitions recorded", noted, "/s", peer, bare, 1.5)

    n = 30_000 if quick else 300_000
    steps, bare = side_by_side((walk_ours, n), (walk_dict, n))
    yield Figure("walk of the table", steps, "/s", "a bare nested dict", bare, 0.5)
    for name, made in (
        ("transitions", walk_transitions()),
        ("python-statemachine", walk_python_statemachine()),
        ("automat", walk_automat()),
    ):
        slow = None
        if made is not None:
            steps, slow = side_by_side((walk_ours, n), (made, n // 100))
        yield Figure("walk of the table", steps, "/s", name, slow, 20)

    few, many = 1_000, (10_000, 100_000) if quick else (10_000, 100_000, 1_000_000)
    n = 200 if quick else 500
    small, _ = standing(few)
    for count in many:
        large, size = standing(count)
        yield Figure(
            f"TIME_WAIT, {count:,} standing", size, "bytes each", target=250, lower_is_better=True
        )
        yield Figure(
            f"lifecycle beside {count:,} in TIME_WAIT",
            1e6 * cost_beside(large, n),
            "µs",
            f"beside {few:,}",
            1e6 * cost_beside(small, n),
            1.5,
            lower_is_better=True,
        )
        del large
    del small
    worlds = WORLDS[:2] if quick else WORLDS
    found = [explore(LINUX, world) for world in worlds]
    yield Figure(
        "explorer",
        sum(f.states for f in found) / sum(f.seconds for f in found),
        "states/s",
        target=50_000,
    )
