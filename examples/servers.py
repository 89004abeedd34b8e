"""How real servers close: each started as its own process, its port watched to the end.

    python -m examples.servers                            list servers and cases
    python -m examples.servers nginx --case sigterm-idle  one case, in words
    python -m examples.servers nginx redis-server         every case of these
    python -m examples.servers --all --markdown           the tables of docs/servers.md

Every case runs in a private network namespace (without root where the system
allows user namespaces), so it leaves nothing behind and nobody else's
traffic is in it. The client closes as soon as it sees the server close, as a
well-behaved one does, and the server is started again at once.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from timewait.events import Row
from timewait.kernel.namespace import isolate
from timewait.kernel.sock_diag import sockets
from timewait.tcp.states import State

ROOT = Path(__file__).resolve().parent.parent
HOST, PORT, BACKEND = "127.0.0.1", 8000, 8001
ANSWER_IN = 10.0  # seconds: a server that has not started or stopped by then never will
AT_ONCE = 0.1  # seconds
SETTLED = {State.LISTEN, State.ESTABLISHED, State.TIME_WAIT}

CASES = {
    "keepalive-timeout": "one request, then idle until the server's keep-alive timeout of 1 s",
    "connection-close": "one request that asks for the connection to be closed after the answer",
    "sigterm-idle": "SIGTERM to the main process while a client is connected and idle",
    "sigterm-busy": "SIGTERM to the main process while a request is being answered",
    "sigkill-idle": "SIGKILL to the main process while a client is connected and idle",
    "sigkill-busy": "SIGKILL to the main process while a request is being answered",
    "sigkill-upload": "SIGKILL to the main process while the client is sending",
}


# --- the servers ------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A server: how it is started in a directory of its own, and what it speaks."""

    name: str
    needs: str  # a program, or "python:" and a module
    command: Callable[[Path], list[str]]
    version: list[str]
    speaks: str = "http"
    backend: bool = False  # asks a second server for the slow answer, as proxies do

    def missing(self) -> str | None:
        """What has to be installed, or None."""
        kind, _, module = self.needs.partition(":")
        if module:
            return None if importlib.util.find_spec(module) else f"the package {module}"
        return None if shutil.which(kind, path=_path()) else f"the program {kind}"


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin"


def _nginx(place: Path) -> list[str]:
    temporary = "".join(
        f"{kind}_temp_path {place}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (place / "nginx.conf").write_text(
        f"""daemon off; worker_processes 1; pid {place}/nginx.pid; error_log stderr;
        {"user root;" if os.geteuid() == 0 else ""}
        events {{ worker_connections 64; }}
        http {{ access_log off; client_max_body_size 0; {temporary} keepalive_timeout 1s;
          server {{ listen {HOST}:{PORT};
            location / {{ return 200 "hello\\n"; }}
            location /slow {{ proxy_pass http://{HOST}:{BACKEND}; }} }} }}
        """
    )
    return ["nginx", "-e", "stderr", "-p", str(place), "-c", str(place / "nginx.conf")]


def _haproxy(place: Path) -> list[str]:
    (place / "haproxy.cfg").write_text(
        f"""
defaults
  mode http
  timeout connect 1s
  timeout client 5s
  timeout server 5s
  timeout http-keep-alive 1s
frontend web
  bind {HOST}:{PORT}
  http-request return status 200 content-type text/plain string hello if {{ path / }}
  default_backend app
backend app
  server one {HOST}:{BACKEND}
"""
    )
    return ["haproxy", "-W", "-f", str(place / "haproxy.cfg")]


def _redis(place: Path) -> list[str]:
    flags = f"--port {PORT} --bind {HOST} --timeout 1 --appendonly no --dir {place} --save"
    return ["redis-server", *flags.split(), ""]


def _python(arguments: str) -> Callable[[Path], list[str]]:
    return lambda place: [sys.executable, "-m", *arguments.split()]


def _version_of(package: str) -> list[str]:
    code = f"import importlib.metadata as m; print('{package}', m.version('{package}'))"
    return [sys.executable, "-c", code]


_GUNICORN = f"gunicorn --bind {HOST}:{PORT} --workers 1 --keep-alive 1 --log-level error"
_PYTHON_VERSION = [sys.executable, "--version"]

SERVERS = {
    server.name: server
    for server in (
        Server(
            "uvicorn",
            "python:uvicorn",
            _python(
                f"uvicorn --host {HOST} --port {PORT} --timeout-keep-alive 1 "
                "--log-level warning examples.apps:asgi"
            ),
            _version_of("uvicorn"),
        ),
        Server(
            "hypercorn",
            "python:hypercorn",
            _python(f"hypercorn --bind {HOST}:{PORT} --keep-alive 1 examples.apps:asgi"),
            _version_of("hypercorn"),
        ),
        Server(
            "gunicorn-sync",
            "python:gunicorn",
            _python(f"{_GUNICORN} --worker-class sync examples.apps:wsgi"),
            _version_of("gunicorn"),
        ),
        Server(
            "gunicorn-gthread",
            "python:gunicorn",
            _python(f"{_GUNICORN} --worker-class gthread --threads 2 examples.apps:wsgi"),
            _version_of("gunicorn"),
        ),
        Server(
            "aiohttp",
            "python:aiohttp",
            _python(f"examples.apps aiohttp {PORT}"),
            _version_of("aiohttp"),
        ),
        Server(
            "http.server",
            "python:http.server",
            _python(f"examples.apps http {PORT}"),
            _PYTHON_VERSION,
        ),
        Server(
            "socketserver",
            "python:socketserver",
            _python(f"examples.apps socketserver {PORT}"),
            _PYTHON_VERSION,
            speaks="lines",
        ),
        Server("nginx", "nginx", _nginx, ["nginx", "-v"], backend=True),
        Server(
            "redis-server", "redis-server", _redis, ["redis-server", "--version"], speaks="redis"
        ),
        Server("haproxy", "haproxy", _haproxy, ["haproxy", "-v"], backend=True),
    )
}


# --- a client that can wait -------------------------------------------------------------

_ASK = {
    "http": {
        "quick": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "slow": b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n",
        "close": b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        "upload": b"POST /slow HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n",
    },
    "lines": {"quick": b"hello\n", "slow": b"slow\n", "close": b"bye\n", "upload": b"long: "},
    "redis": {
        "quick": b"PING\r\n",
        "slow": b"BLPOP nothing 1\r\n",
        "close": b"QUIT\r\n",
        "upload": b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$400000000\r\n",
    },
}


class Client(threading.Thread):
    """A connection to the server that is closed as soon as the server has closed it."""

    def __init__(self, speaks: str) -> None:
        super().__init__(daemon=True)
        self.speaks = speaks
        self.socket = socket.create_connection((HOST, PORT), timeout=5)
        self.port: int = self.socket.getsockname()[1]
        self.received = b""
        self.uploads = False
        self.ended_at: float | None = None  # when the server's end was seen
        self.answered = threading.Event()
        self.leave = threading.Event()

    def ask(self, what: str) -> None:
        self.socket.sendall(_ASK[self.speaks][what])
        self.uploads = what == "upload"
        self.start()

    def run(self) -> None:
        """Take in what comes (and go on sending, if that was asked for) until the end."""
        self.socket.settimeout(0.005)
        while not self.leave.is_set():
            try:
                if self.uploads:
                    self.socket.send(b"x" * 65_536)
                data = self.socket.recv(65_536)
            except TimeoutError:
                continue
            except OSError:  # reset
                data = b""
            self.received += data
            if self.whole():
                self.answered.set()
            if not data:
                self.ended_at = time.monotonic()
                break
        self.socket.close()

    def whole(self) -> bool:
        """Whether an answer has come in whole."""
        if self.speaks != "http":
            return self.received.endswith(b"\n")
        head, blank, body = self.received.partition(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                return len(body) >= int(line.split(b":")[1])
        return bool(blank) and body.endswith(b"0\r\n\r\n")

    def wait(self, limit: float) -> bool:
        """Whether the server closed within `limit` seconds."""
        self.join(limit)
        return not self.is_alive()

    def close(self) -> None:
        self.leave.set()
        if self.ident is None:
            self.socket.close()
        else:
            self.join()


# --- one case ---------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one case showed. Times in seconds."""

    server: str
    version: str
    case: str
    closed_first: str  # "server", "client" or "nobody"
    how: str = ""  # FIN or RST
    after: float | None = None  # from the request's end, or from the signal
    answer: str = ""  # busy cases: "whole", "cut short", "none"
    exit: str = ""  # how the main process ended
    left: list[str] = field(default_factory=list)  # "TIME_WAIT (server)"
    resets: list[str] = field(default_factory=list)  # who sent one
    restart: str = ""  # "binds", "refused", ...
    restart_after: float | None = None
    why: str = ""
    note: str = ""

    @property
    def command(self) -> str:
        return f"python -m examples.servers {self.server} --case {self.case}"


def study(server: Server, case: str) -> Outcome:
    """Run one case; this process must be alone in its network namespace."""
    with tempfile.TemporaryDirectory(prefix="timewait-") as name, _no_orphans():
        place = Path(name)
        place.chmod(0o755)
        wire = _listen_to_the_wire()
        if server.backend:
            _spawn([sys.executable, "-m", "examples.apps", "http", str(BACKEND)], place / "backend")
            _until(lambda: _listening(BACKEND))
        command = server.command(place)
        process = _spawn(command, place / "log")
        _until(lambda: _listening(PORT) or process.poll() is not None)
        time.sleep(0.2)  # let a worker that was just forked reach its loop
        if process.poll() is not None or not _listening(PORT):
            raise SystemExit(f"{server.name} did not start: {_tail(place / 'log')}")
        outcome = Outcome(server.name, _version(server), case, "nobody")

        doing = case.split("-")[1]
        client = Client(server.speaks)
        client.ask({"busy": "slow", "upload": "upload", "close": "close"}.get(doing, "quick"))
        if doing in ("busy", "upload"):
            time.sleep(0.3)
        elif not client.answered.wait(ANSWER_IN):
            raise SystemExit(f"{server.name} did not answer: {_tail(place / 'log')}")
        if doing == "idle" and client.wait(0.3):
            outcome.note = "closes after every answer: the idle client sent nothing"
            client = Client(server.speaks)
            client.start()
            time.sleep(0.1)

        began = time.monotonic()
        if stop := {"sigterm": signal.SIGTERM, "sigkill": signal.SIGKILL}.get(case[:7]):
            process.send_signal(stop)
        else:
            client.wait(4)
            process.terminate()
        _see_the_end(process, client, outcome)
        _until(lambda: not _listening(PORT), AT_ONCE)  # what workers that notice it do at once
        survivors = [pid for pid in _descendants() if "backend" not in _log_of(pid)]
        held = [row for row in sockets(PORT) if row.local[1] == PORT]
        shares = {reuse: _bindable(reuse_address=reuse) for reuse in (False, True)}
        _restart(outcome, command, place)
        lasting = any(_owns_listener(pid) for pid in survivors)
        outcome.why = _why(outcome, held, shares, bool(survivors), lasting)

        client.wait(4)
        client.close()
        if client.ended_at is not None:
            outcome.after = max(client.ended_at - began, 0.0)
        if doing == "busy":
            outcome.answer = (
                "whole" if client.whole() else "cut short" if client.received else "none"
            )
        _until(lambda: all(row.state in SETTLED for row in sockets(PORT)), 2)
        ours = [row for row in sockets(PORT) if client.port in (row.local[1], row.remote[1])]
        outcome.left = sorted({_side(row) for row in ours})
        segments = [segment for segment in wire() if client.port in segment[:2]]
        for source, _, flags in segments:
            if flags & (FIN | RST):
                outcome.closed_first = "server" if source == PORT else "client"
                outcome.how = "FIN" if flags & FIN else "RST"
                break
        if outcome.closed_first == "nobody":
            outcome.after = None
        resets = {source for source, _, flags in segments if flags & RST}
        outcome.resets = sorted("server" if source == PORT else "client" for source in resets)
        return outcome


def _see_the_end(process: subprocess.Popen[bytes], client: Client, outcome: Outcome) -> None:
    """Wait until the main process, told to stop, has; if the client keeps it, end that."""
    began = time.monotonic()
    for patience in ("", "only after the client left", "killed after that"):
        try:
            status = process.wait(ANSWER_IN)
        except subprocess.TimeoutExpired:
            if patience:
                process.kill()
            client.close()
            continue
        took = time.monotonic() - began
        word = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit {status}"
        outcome.exit = f"{word} {_seconds(took)} {patience}".strip()
        return


def _restart(outcome: Outcome, command: list[str], place: Path) -> None:
    """Start the server again and see whether it gets its port."""
    began = time.monotonic()
    again = _spawn(command, place / "again")
    _until(lambda: again.poll() is not None or _owns_listener(again.pid))
    outcome.restart_after = time.monotonic() - began
    if again.poll() is not None:
        outcome.restart = "refused"
    else:
        outcome.restart = "binds" if _owns_listener(again.pid) else "never binds"
    log = (place / "again").read_text(errors="replace").lower()
    if outcome.restart == "binds" and "in use" in log:
        outcome.restart = "binds on a later try"


def _why(
    outcome: Outcome, left: list[Row], shares: dict[bool, bool], survivors: bool, lasting: bool
) -> str:
    """The rule behind the restart's outcome: what held the port and who may share it.

    `survivors` are processes of the old server after its end, `lasting` is
    whether any of them still listened when the new server did.
    """
    going = (State.FIN_WAIT_1, State.FIN_WAIT_2)  # to TIME_WAIT, in a moment
    holders = sorted({str(State.TIME_WAIT if row.state in going else row.state) for row in left})
    if survivors and "LISTEN" in holders:
        if outcome.restart == "binds" and lasting:
            return "workers of the old server still listen, and share the port by SO_REUSEPORT"
        if outcome.restart == "binds":
            return "workers of the old server ended before the new one, slow to start, bound"
        return "workers of the old server outlived its main process and still listen"
    plain, reuse = shares[False], shares[True]
    if plain:
        return "nothing of the server's is left at the port"
    held = " and ".join(holders) or "something unseen"
    if outcome.restart.startswith("binds"):
        if reuse:
            return f"{held} is left, and old and new server both set SO_REUSEADDR"
        return f"{held} is left: it shares the port by SO_REUSEPORT"
    if reuse:
        return f"{held} is left, and the new server does not set SO_REUSEADDR"
    return f"{held} is left of a server that did not set SO_REUSEADDR"


def _side(row: Row) -> str:
    return f"{row.state} ({'server' if row.local[1] == PORT else 'client'})"


def _bindable(*, reuse_address: bool) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse_address)
        try:
            sock.bind((HOST, PORT))
            sock.listen()
        except OSError:
            return False
    return True


def _listening(port: int) -> bool:
    return any(r.local[1] == port for r in sockets(port, states=[State.LISTEN]))


def _owns_listener(pid: int) -> bool:
    """Whether the process, or one it started, has the listening socket open."""
    inodes = {f"socket:[{row.inode}]" for row in sockets(PORT, states=[State.LISTEN])}
    for each in [pid, *_descendants(pid)]:
        try:
            fds = list(Path(f"/proc/{each}/fd").iterdir())
            if any(os.readlink(fd) in inodes for fd in fds):
                return True
        except OSError:
            continue
    return False


def _version(server: Server) -> str:
    done = subprocess.run(
        server.version, capture_output=True, text=True, env={**os.environ, "PATH": _path()}
    )
    line = (done.stdout + done.stderr).strip().splitlines()[0]
    for word in line.replace("nginx/", "nginx ").replace("v=", " ").split():
        if word[0].isdigit():
            return word
    return line


def _log_of(pid: int) -> str:
    """The file that a process's output goes to, which tells whose it is."""
    try:
        return os.readlink(f"/proc/{pid}/fd/1")
    except OSError:
        return ""


def _spawn(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": _path()}
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=environment,
        )


def _tail(log: Path) -> str:
    return " / ".join(log.read_text(errors="replace").strip().splitlines()[-3:])


def _until(condition: Callable[[], object], limit: float = ANSWER_IN) -> bool:
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# --- processes and the namespace --------------------------------------------------------

_LIBC = ctypes.CDLL(None, use_errno=True)
_SUBREAPER = 36


def _descendants(pid: int | None = None) -> list[int]:
    found: list[int] = []
    frontier = [os.getpid() if pid is None else pid]
    while frontier:
        parent = frontier.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                children = [int(child) for child in task.read_text().split()]
            except OSError:
                continue
            found += children
            frontier += children
    return found


@contextmanager
def _no_orphans() -> Iterator[None]:
    """Whatever the servers started ends with the case, workers whose master died too."""
    _LIBC.prctl(_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        while processes := _descendants():
            for pid in processes:
                try:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                except (ProcessLookupError, ChildProcessError):
                    pass


FIN, RST = 0x01, 0x04


# Classic BPF over an IP packet: TCP with FIN or RST (the rest of an upload would drown them).
_ENDS = [
    (0x30, 0, 0, 9),  # A = protocol
    (0x15, 0, 4, 6),  # TCP, or drop
    (0xB1, 0, 0, 0),  # X = length of the IP header
    (0x50, 0, 0, 13),  # A = flags
    (0x45, 0, 1, FIN | RST),
    (0x06, 0, 0, 128),  # keep
    (0x06, 0, 0, 0),  # drop
]


def _listen_to_the_wire() -> Callable[[], list[tuple[int, int, int]]]:
    """Record the FINs and RSTs on loopback: (from port, to port, flags), given when called."""
    packet = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in _ENDS))
    packet.setsockopt(  # SO_ATTACH_FILTER
        socket.SOL_SOCKET, 26, struct.pack("HP", len(_ENDS), ctypes.addressof(program))
    )
    packet.bind(("lo", 0x0003))
    packet.setblocking(False)

    def drain() -> list[tuple[int, int, int]]:
        segments = []
        with packet:
            while True:
                try:
                    data, (_, _, kind, *_) = packet.recvfrom(128)
                except BlockingIOError:
                    return segments
                if kind != socket.PACKET_OUTGOING:  # loopback shows each packet twice
                    start = (data[0] & 15) * 4
                    source, destination = struct.unpack_from("!HH", data, start)
                    segments.append((source, destination, data[start + 13]))

    return drain


# --- words and tables -------------------------------------------------------------------


def _seconds(value: float | None) -> str:
    return "" if value is None else "at once" if value < AT_ONCE else f"after {value:.1f} s"


def in_words(outcome: Outcome) -> str:
    lines = [
        f"{outcome.server} {outcome.version}: {CASES[outcome.case]}",
        f"  closed first  {outcome.closed_first} {outcome.how} {_seconds(outcome.after)}".rstrip(),
    ]
    if outcome.answer:
        lines.append(f"  answer        {outcome.answer}")
    lines += [
        f"  process       {outcome.exit}",
        f"  left          {', '.join(outcome.left) or 'nothing'}",
        f"  resets        {' and '.join(f'by the {who}' for who in outcome.resets) or 'none'}",
        f"  restart       {outcome.restart} {_seconds(outcome.restart_after)}",
        f"  why           {outcome.why}",
    ]
    if outcome.note:
        lines.append(f"  note          {outcome.note}")
    return "\n".join(lines)


def in_markdown(outcomes: list[Outcome]) -> str:
    """One table at a glance, then one for each server with the command in every row."""
    cases = list(dict.fromkeys(each.case for each in outcomes))
    lines = [
        f"Measured on Linux {platform.release().split('-')[0]}, {time.strftime('%-d %B %Y')}.",
        "",
        "| who closes first, does a restart bind? | " + " | ".join(cases) + " |",
        "|---" * (len(cases) + 1) + "|",
    ]
    for name in dict.fromkeys(each.server for each in outcomes):
        cells = [
            f"{each.closed_first}{' by RST' if each.how == 'RST' else ''}, {each.restart}"
            for each in outcomes
            if each.server == name
        ]
        lines.append(f"| **{name}** | " + " | ".join(cells) + " |")
    heading = None
    for each in outcomes:
        if each.server != heading:
            heading = each.server
            lines += [
                "",
                f"## {each.server} {each.version}",
                "",
                "| reproduce | closes first | answer | process | left | resets "
                "| restart, and why |",
                "|---|---|---|---|---|---|---|",
            ]
        first = f"{each.closed_first} {each.how} {_seconds(each.after)}".strip()
        cells = [
            f"`{each.command}`",
            f"{first} ({each.note})" if each.note else first,
            each.answer or "-",
            each.exit,
            ", ".join(each.left) or "nothing",
            " and ".join(f"by the {who}" for who in each.resets) or "none",
            f"**{each.restart}**: {each.why}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _in_own_process(name: str, case: str) -> Outcome:
    done = subprocess.run(
        [sys.executable, "-m", "examples.servers", name, "--case", case, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode:
        raise SystemExit(f"{name} {case}: {done.stderr.strip() or done.returncode}")
    return Outcome(**json.loads(done.stdout)[0])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.servers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("server", nargs="*", choices=[*SERVERS, []], help="which servers")
    parser.add_argument("--all", action="store_true", help="every server")
    parser.add_argument("--case", choices=CASES, help="one case instead of all")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a JSON list of outcomes")
    form.add_argument("--markdown", action="store_true", help="tables for the documentation")
    wanted = parser.parse_args(arguments)
    servers = list(SERVERS.values()) if wanted.all else [SERVERS[name] for name in wanted.server]
    if not servers:
        for server in SERVERS.values():
            missing = server.missing()
            print(f"{server.name:18}{f'missing: {missing}' if missing else 'ready'}")
        for name, meaning in CASES.items():
            print(f"  --case {name:20}{meaning}")
        return 0
    for server in servers:
        if missing := server.missing():
            parser.error(f"{server.name} needs {missing}")
    cases = [wanted.case] if wanted.case else list(CASES)
    if len(servers) == len(cases) == 1:
        try:
            isolate(uid=os.geteuid())
        except OSError as refused:
            parser.error(f"no private network namespace: {refused.strerror or refused}")
        outcomes = [study(servers[0], cases[0])]
    else:
        pairs = [(server.name, case) for server in servers for case in cases]
        with ThreadPoolExecutor(4) as pool:
            outcomes = list(pool.map(lambda pair: _in_own_process(*pair), pairs))
    if wanted.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
    elif wanted.markdown:
        print(in_markdown(outcomes), end="")
    else:
        print("\n\n".join(map(in_words, outcomes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
