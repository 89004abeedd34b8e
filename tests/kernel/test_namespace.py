"""Private network namespaces, made as root and as anybody else."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from timewait.kernel.namespace import Namespace, sysctl, why_not
from timewait.kernel.sock_diag import sockets

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root to be root and nobody in turn"
)


def python(*prefix: str, home: Path, program: str) -> str:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", textwrap.dedent(program)],
        env={"PYTHONPATH": str(home), "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.environ["PATH"]},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.strip()


def ours() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


def test_root_uses_a_namespace_without_moving() -> None:
    before = ours()
    with Namespace(sysctls={"net.ipv4.tcp_fin_timeout": 7}) as ns:
        assert ns.how == "root"
        assert ns.inode != before
        assert ns.call(sysctl, "net.ipv4.tcp_fin_timeout") == "7"
        assert ns.call(ours) == ns.inode
        with ns.socket(socket.AF_INET) as server:
            server.bind(("127.0.0.1", 9090))
            server.listen()
            assert [row.local for row in ns.call(sockets)] == [("127.0.0.1", 9090)]
        assert ours() == before
        assert sysctl("net.ipv4.tcp_fin_timeout") != "7"


def test_entering_comes_back_after_an_exception() -> None:
    before = ours()
    with Namespace() as ns:
        with suppress(ZeroDivisionError), ns.entered():
            assert ours() == ns.inode
            raise ZeroDivisionError
        assert ours() == before


def test_loopback_works_and_nothing_else_is_there() -> None:
    with Namespace() as ns, ns.entered():
        assert socket.if_nameindex() == [(1, "lo")]
        with (
            socket.create_server(("::1", 0), family=socket.AF_INET6) as server,
            socket.create_connection(server.getsockname()[:2]),
        ):
            pass
        with pytest.raises(OSError, match="unreachable"):
            socket.create_connection(("192.0.2.1", 80), timeout=5)


def test_a_failing_setting_leaves_nothing() -> None:
    fds = {*os.listdir("/proc/self/fd")}
    with pytest.raises(FileNotFoundError):
        Namespace(sysctls={"net.ipv4.no_such_thing": 1})
    assert {*os.listdir("/proc/self/fd")} <= fds  # (what tests before forgot may go meanwhile)


@pytest.mark.parametrize("name", ["kernel.hostname", "/tmp/hostname", "net/../kernel.hostname"])
def test_the_machines_own_settings_are_out_of_reach(name: str) -> None:
    before = Path("/proc/sys/kernel/hostname").read_text()
    with Namespace() as ns, pytest.raises(OSError):
        ns.call(sysctl, name, before.strip())
    with pytest.raises(OSError, match=r"not a setting of a network namespace|No such file"):
        Namespace(sysctls={name: before.strip()})


def test_a_closed_namespace_makes_no_socket_elsewhere() -> None:
    """The descriptor's number is another file's then: this thread's own namespace, if any."""
    ns = Namespace()
    ns.close()
    with pytest.raises(OSError, match="this namespace is closed"):
        ns.socket(socket.AF_INET)


AS_ANYBODY = """
    import os, socket
    from timewait.kernel.namespace import Namespace, sysctl, why_not
    from timewait.kernel.sock_diag import sockets
    assert why_not() is None
    with Namespace(sysctls={"net.ipv4.tcp_tw_reuse": 1}) as ns:
        server = ns.socket(socket.AF_INET)
        server.bind(("127.0.0.1", 80))
        server.listen()
        client = ns.socket(socket.AF_INET)
        client.connect(("127.0.0.1", 80))
        raw = ns.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        assert not os.get_inheritable(raw.fileno())
        rows = ns.call(sockets, 80)
        print(ns.how, len(rows), ns.call(sysctl, "net.ipv4.tcp_tw_reuse"))
        try:
            ns.call(sysctl, "net.ipv4.nonsense")
        except FileNotFoundError:
            print("error came through")
        try:
            with ns.entered(): pass
        except PermissionError as error:
            print(error.strerror)
        pid = ns._helper.pid
    assert not os.path.exists(f"/proc/{pid}")
"""


def test_anybody_has_a_namespace_by_a_helper(importable: Path, nobody: tuple[str, ...]) -> None:
    assert python(*nobody, home=importable, program=AS_ANYBODY).splitlines() == [
        "user 3 1",
        "error came through",
        "only root can enter a network namespace and return",
    ]


def test_the_helper_ends_when_its_owner_is_killed(
    importable: Path, nobody: tuple[str, ...]
) -> None:
    program = """
        import os, signal
        from timewait.kernel.namespace import Namespace
        ns = Namespace()
        print(ns._helper.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    pid = int(python(*nobody, home=importable, program=program))
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.01)
    pytest.fail("the helper process lives on")


@pytest.mark.parametrize("who", ["root", "nobody", "root of its own"])
def test_a_process_isolates_itself(
    importable: Path, who: str, request: pytest.FixtureRequest
) -> None:
    prefix = ("unshare", "-Urn") if who == "root of its own" else ()
    if who == "nobody":
        prefix = request.getfixturevalue("nobody")
    program = """
        import os, socket
        from timewait.kernel.namespace import isolate
        before = os.stat("/proc/self/ns/net").st_ino
        how = isolate(sysctls={"net.ipv4.tcp_fin_timeout": 5})
        assert os.stat("/proc/self/ns/net").st_ino != before
        server = socket.create_server(("127.0.0.1", 80))
        socket.create_connection(("127.0.0.1", 80))
        print(how, os.getuid(), open("/proc/sys/net/ipv4/tcp_fin_timeout").read().strip())
    """
    how = "user" if who == "nobody" else "root"
    assert python(*prefix, home=importable, program=program) == f"{how} 0 5"


def test_an_isolated_process_may_keep_its_user(importable: Path, nobody: tuple[str, ...]) -> None:
    program = """
        import os
        from timewait.kernel.namespace import isolate
        isolate(uid=os.getuid())
        print(os.getuid(), os.getgid())
    """
    assert python(*nobody, home=importable, program=program) == "65534 65534"


def test_a_process_with_threads_is_told_so(importable: Path, nobody: tuple[str, ...]) -> None:
    program = """
        import threading
        from timewait.kernel.namespace import isolate
        done = threading.Event()
        threading.Thread(target=done.wait).start()
        try:
            isolate()
        except PermissionError as error:
            print(error.strerror)
        done.set()
    """
    assert "this process already has threads" in python(*nobody, home=importable, program=program)


def test_disabled_user_namespaces_are_named(importable: Path) -> None:
    # In a user namespace that allows no further ones, as a "root" without any capability.
    program = """
        from timewait.kernel.namespace import why_not
        print(why_not())
    """
    assert python(
        *("unshare", "-Ur", "sh", "-c"),
        'echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-all "$@"',
        "sh",
        home=importable,
        program=program,
    ) == (
        "no private network namespace without root: user namespaces are disabled here "
        "(user.max_user_namespaces is 0)"
    )


def test_why_not_is_none_where_it_works() -> None:
    assert why_not() is None
