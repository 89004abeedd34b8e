import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from attrs import evolve
from attrs.exceptions import FrozenInstanceError
from hypothesis import given
from hypothesis import strategies as st

from timewait import Scenario, ScenarioError
from timewait.scenario import BUILT_IN, WITH_FAULTS, Close, Connect, Listen, Restart

SERVER_FIRST = Scenario(port=9090).listen().connect(2).close("server").restart()


def test_each_method_returns_a_scenario_with_one_more_step() -> None:
    empty = Scenario(port=9090)
    assert empty.listen().connect(2).steps == (Listen(), Connect(2))
    assert empty.steps == ()
    assert SERVER_FIRST.steps == (Listen(), Connect(2), Close("server"), Restart())


def test_a_scenario_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        SERVER_FIRST.port = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", BUILT_IN | WITH_FAULTS)
def test_built_in_scenarios_survive_pickle_and_toml(name: str) -> None:
    scenario = Scenario.built_in(name, clients=3)
    assert scenario.clients == (7 if name == "peer-vanishes" else 3)  # one for each state
    assert pickle.loads(pickle.dumps(scenario)) == scenario
    assert Scenario.from_toml(scenario.to_toml()) == scenario


def test_the_eight_stories_are_there() -> None:
    assert {
        "server-first",
        "clients-first",
        "simultaneous",
        "half-close",
        "abort",
        "unread-data",
        "orphan",
        "close-wait-leak",
    } <= set(BUILT_IN)


def test_faults_keep_a_scenario_from_the_kernel() -> None:
    story = SERVER_FIRST.fault("drop", "FIN", "server")
    assert story.stacks == ("model", "wire")
    assert Scenario.from_toml('faults = [{act = "drop", segments = "FIN"}]').stacks == story.stacks
    with pytest.raises(ScenarioError, match="does not run on 'kernel'"):
        story.run_sync(on="kernel")


def test_a_file_is_read_back_and_names_the_scenario(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    SERVER_FIRST.save(path)
    assert Scenario.load(path).steps == SERVER_FIRST.steps
    assert Scenario.load(path).name == "mine"


ENDS = st.sampled_from(["server", "client", "client-1", "server-1"])


@given(
    host=st.ip_addresses().map(str),
    port=st.integers(0, 65535),
    clients=st.integers(1, 9),
    who=ENDS,
    size=st.integers(1, 10**6),
    seconds=st.floats(0, 1e6),
    flags=st.tuples(st.booleans(), st.booleans(), st.none() | st.booleans()),
    about=st.text(),
)
def test_any_scenario_survives_toml(
    host: str,
    port: int,
    clients: int,
    who: str,
    size: int,
    seconds: float,
    flags: tuple[bool, bool, bool | None],
    about: str,
) -> None:
    scenario = (
        Scenario(host, port, about=about)
        .listen(reuse_address=flags[0], reads=flags[1])
        .connect(clients, at_eof="ignore")
        .send(who, size)
        .shutdown(who)
        .pause(seconds)
        .eof("server")
        .abort(who)
        .restart(reuse_address=flags[2])
    )
    assert Scenario.from_toml(scenario.to_toml()) == scenario


def pair(start: Scenario) -> Scenario:
    return start.listen().connect(2)


@pytest.mark.parametrize(
    "story",
    [
        pair(Scenario()).close("client-1").close("client").close("server"),
        pair(Scenario()).close("client").close("server").restart().close("server"),
        pair(Scenario()).shutdown("client").eof("client").close("client"),
        pair(Scenario()).close("client").connect().send("client-3").close("client"),
        pair(Scenario()).shutdown("client-1").send("client"),
        pair(Scenario()).close("listener").close("server").close("client"),
        Scenario().listen().close("server").listen(),
    ],
)
def test_what_is_left_open_may_act(story: Scenario) -> None:
    assert Scenario.from_toml(story.to_toml()) == story


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda s: s.connect(), "step 1, connect: nobody listens"),
        (lambda s: s.close("server"), "step 1, close: nobody is connected"),
        (lambda s: s.restart(), "step 1, restart: the server never ran"),
        (lambda s: s.listen().listen(), "step 2, listen: the server listens already"),
        (lambda s: s.listen().connect(-1), "step 2: 'clients' must be >= 1: -1"),
        (lambda s: s.listen().connect("2"), "step 2: 'clients' must be a whole number: '2'"),
        (lambda s: s.listen(backlog=1 << 31), "step 1: 'backlog' must be < 2147483648"),
        (lambda s: s.listen().connect().send("client", 1.5), "'size' must be a whole number: 1.5"),
        (lambda s: s.listen().connect(2).close("client-3"), "step 3, close: there is no client-3"),
        (lambda s: s.listen().connect().close("peer"), "step 3, close: who is 'peer'?"),
        (lambda s: s.listen().connect().send("both"), "step 3, send: who is 'both'?"),
        (lambda s: s.listen().connect().close("listener").connect(), "step 4, connect: nobody"),
        (lambda s: pair(s).close("client").send("client"), "step 4, send: the clients have closed"),
        (lambda s: pair(s).close("client").close("client-2"), "step 4, close: client-2 has closed"),
        (
            lambda s: pair(s).close("client-1").abort("client-1"),
            "abort: client-1 has closed before",
        ),
        (
            lambda s: pair(s).abort("server").shutdown("server"),
            "shutdown: server has closed before",
        ),
        (lambda s: pair(s).close("both").eof("client"), "eof: the clients have closed before"),
        (lambda s: pair(s).close("both").close("both"), "step 4, close: both ends have closed"),
        (
            lambda s: pair(s).shutdown("client").send("client-1"),
            "client-1 has ended sending before",
        ),
        (lambda s: pair(s).shutdown("client").shutdown("client"), "the clients have ended sending"),
        (lambda s: pair(s).close("client-1").shutdown("client").close("client-1"), "has closed"),
        (lambda s: s.listen().pause(-1), "'seconds' must be 0 or more, and finite: -1"),
        (lambda s: s.listen().pause(float("nan")), "'seconds' must be 0 or more"),
        (lambda s: s.listen(at_eof="sleep"), "'at_eof' must be in"),
        (lambda s: Scenario(port="80"), "port '80' is not between"),
        (lambda s: Scenario(port=70000), "port 70000 is not between"),
        (lambda s: Scenario("example.com"), "'example.com' is not an IPv4 or IPv6 address"),
        (lambda s: Scenario.built_in("server-frist"), "no scenario is called 'server-frist'"),
        (lambda s: Scenario.built_in("server-first", clients=0), "0 clients"),
    ],
)
def test_a_step_that_makes_no_sense_is_named_at_once(build, why: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ScenarioError) as wrong:
        build(Scenario())
    assert why in str(wrong.value)
    assert "\n" not in str(wrong.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("port = ", "not TOML"),
        ("prot = 9090", "unknown key 'prot'; known are host, port"),
        (
            "step = []",
            "unknown key 'step'; known are host, port, name, about, time_limit, stacks, "
            "steps, faults",
        ),
        ('stacks = "model"', "stacks: a list is expected"),
        ('stacks = ["moon"]', "stacks ['moon']: a list of kernel, model, wire is expected"),
        ("stacks = []", "stacks []: a list of kernel, model, wire is expected"),
        ('port = "9090"', 'port: a whole number is expected, not "9090"'),
        ("port = 9090.0", "port: a whole number is expected"),
        ("port = true", "port: a whole number is expected"),
        ("time_limit = 0", "'time_limit' must be > 0"),
        ("time_limit = inf", "'time_limit' must be < inf"),
        ("steps = 3", "steps: a list of tables is expected"),
        ("steps = [3]", "step 1: a table is expected"),
        ("steps = [{}]", "step 1: it says not what to do"),
        ('steps = [{do = "dance"}]', "step 1: unknown step 'dance'; do is one of listen"),
        ('steps = [{do = "listen", baklog = 1}]', "step 1, listen: unknown key 'baklog'"),
        ('steps = [{do = "listen", reads = 1}]', "step 1, listen: reads: true or false"),
        ('steps = [{do = "close"}]', "step 1, close: 'who' is missing"),
        ('steps = [{do = "connect"}]', "step 1, connect: nobody listens"),
        ("faults = 3", "faults: a list of tables is expected"),
        ('faults = [{act = "drop"}]', "fault 1: 'segments' is missing"),
        ('faults = [{act = "melt", segments = "FIN"}]', "fault 1: 'act' must be in"),
        ('faults = [{act = "drop", segments = "FUN"}]', "fault 1: 'segments' must be in"),
        ('faults = [{act = "drop", segments = "FIN", n = 1}]', "fault 1: unknown key 'n'"),
        (
            'stacks = ["kernel"]\nfaults = [{act = "drop", segments = "FIN"}]',
            "faults take a link of one's own",
        ),
        (
            'steps = [{do = "listen"}, {do = "connect", clients = -2}]',
            "step 2, connect: 'clients' must be >= 1: -2",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_place(
    text: str, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ScenarioError) as wrong:
        Scenario.load(path)
    assert str(wrong.value).startswith(f"{path}: {why}")
    assert "\n" not in str(wrong.value)


@pytest.mark.parametrize("data", [b"\xff\xfe", None])
def test_a_file_that_cannot_be_read_is_named(data: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "gone.toml"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ScenarioError, match=r"gone\.toml: (not TOML|No such file)"):
        Scenario.load(path)


def test_what_vanishes_and_what_is_forged_needs_a_link_of_its_own() -> None:
    story = Scenario().listen().connect().inject("server-1", "SYN,ACK", -5).vanish("client")
    assert story.stacks == ("model", "wire")
    assert [str(step) for step in story.steps[2:]] == [
        "a forged SYN,ACK -5 comes to server-1",
        "clients vanish",
    ]
    assert Scenario.from_toml(story.to_toml()) == story
    gone = {"do": "vanish", "who": "client-1", "back": True}
    plain = Scenario.from_dict({"steps": [{"do": "listen"}, {"do": "connect"}, gone]})
    assert (plain.stacks, str(plain.steps[-1])) == (
        ("model", "wire"),
        "client-1 vanishes and comes back",
    )
    deaf = Scenario().listen().connect(deaf=True).connect(2, deaf=True)
    deaf = deaf.vanish("client", deaf=True).close("client")
    assert [str(step) for step in deaf.steps[1:4]] == [
        "a deaf client connects",
        "2 deaf clients connect",
        "clients hear nothing any more",
    ]
    assert Scenario.from_toml(deaf.to_toml()) == deaf
    for story in plain, deaf:
        with pytest.raises(ScenarioError, match="deaf clients take a link of one's own"):
            evolve(story, stacks=("kernel",))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda s: s.inject("server", "RTS"), "flags 'RTS': names of FIN, SYN"),
        (lambda s: s.inject("nobody"), "who is 'nobody'"),
        (lambda s: s.inject("server", "RST", 1 << 40), "offset"),
        (lambda s: s.vanish("client-2"), "there is no client-2"),
        (lambda s: s.vanish("client").close("client"), "the clients have closed before"),
        (lambda s: s.vanish("client", back=True, deaf=True), "what is back is not deaf"),
        (lambda s: s.fault("melt", "FIN"), "act"),
    ],
)
def test_a_forged_segment_or_a_vanishing_that_makes_no_sense(
    wrong: Callable[[Scenario], Scenario], why: str
) -> None:
    with pytest.raises(ScenarioError, match=why):
        wrong(Scenario().listen().connect())
