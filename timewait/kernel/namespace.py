"""Private network namespaces: a whole TCP stack of one's own, without root where allowed.

In such a namespace ports are all free, TIME_WAIT disturbs nobody, settings
are its own, nothing can leave for the network, and packets may be captured.
Root makes one directly; anybody else makes it inside a user namespace of
their own (user_namespaces(7)), where the system allows that.

Nothing is ever given a name in the file system: a namespace lives as long as
something refers to it, so that a killed process leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import io
import os
import pickle
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

__all__ = ["Namespace", "isolate", "sysctl", "why_not"]

_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1

T = TypeVar("T")


def isolate(
    *, uid: int = 0, sysctls: Mapping[str, object] | None = None
) -> Literal["root", "user"]:
    """Move this process, for good, into a new network namespace that has only a loopback.

    As root only the calling thread moves, and the threads it starts later.
    For anybody else the whole process must still have a single thread, and
    also enters a user namespace of its own, in which it is `uid` (0: it may
    then change network settings, and so may the programs it starts).

    `sysctls` are settings made there, such as `{"net.ipv4.tcp_tw_reuse": 0}`.
    Returns whose rights made it. Raises `PermissionError` that says why it is
    not allowed, `OSError` where the kernel has no namespaces.
    """
    how = _unshare(uid)
    _set_up(sysctls or {})
    return how


def why_not() -> str | None:
    """Why no private network namespace can be had here, in words; None where one can.

    Found by trying, in a process of its own.
    """
    try:
        with Namespace():
            return None
    except OSError as error:
        return error.strerror or str(error)


def sysctl(name: str, value: object | None = None) -> str:
    """A kernel setting of this thread's network namespace ("net.ipv4.tcp_fin_timeout").

    With `value`, set it first. Raises `OSError` for an unknown or forbidden one, and for
    one that is not of the network (EINVAL): that would be the whole machine's.
    """
    path = Path("/proc/sys") / name.replace(".", "/")
    if path.parts[:4] != ("/", "proc", "sys", "net"):
        raise OSError(errno.EINVAL, f"not a setting of a network namespace: {name!r}")
    if value is not None:
        path.write_text(str(value))
    return path.read_text().strip()


class Namespace:
    """A private network namespace that this process uses without moving into it.

    A context manager; at its end the namespace goes as soon as nothing uses
    it. `how` is "root" or "user": the latter means that a helper process
    holds it, since an ordinary process that enters a user namespace could not
    come back.

        with Namespace(sysctls={"net.ipv4.tcp_tw_reuse": 0}) as ns:
            server = ns.socket(socket.AF_INET, socket.SOCK_STREAM)
            rows = ns.call(sockets, 9090)

    Raises `PermissionError` that says why where none is allowed.
    """

    def __init__(self, *, sysctls: Mapping[str, object] | None = None) -> None:
        self._resources = ExitStack()
        settings = {name: str(value) for name, value in (sysctls or {}).items()}
        self.how: Literal["root", "user"]
        try:
            self._fd = _in_thread(_unshare_net, settings)
            self.how = "root"
            self._resources.callback(os.close, self._fd)
        except PermissionError:
            self._helper = self._resources.enter_context(_Helper(settings))
            self._fd = os.open(f"/proc/{self._helper.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            self.how = "user"
            self._resources.callback(os.close, self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the namespace; sockets made in it keep it alive."""
        self._fd = -1  # its number may soon be another file's, such as this thread's own namespace
        self._resources.close()

    @property
    def inode(self) -> int:
        """The number that `ls -l /proc/PID/ns/net` shows."""
        return os.fstat(self._fd).st_ino

    def socket(self, family: int, kind: int = socket.SOCK_STREAM, proto: int = 0) -> socket.socket:
        """A socket of this namespace, wherever it is used."""
        return self.call(_socket, int(family), int(kind), proto)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function(*arguments)` returns (or raises) when called in the namespace.

        A function at a module's top level, with arguments and a result that
        can be pickled; the result may also be a socket or an `io.FileIO`. Without root it runs
        in the helper process.
        """
        if self.how == "user" and self._fd >= 0:
            return self._helper.call(function, *arguments)  # type: ignore[no-any-return]
        with self.entered():
            return function(*arguments)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have this thread in the namespace for a while (root only).

        What is made inside stays in the namespace; nothing may be awaited
        inside. Threads begun inside are there too, one out of a pool may not
        be (trio keeps its for the next run). Raises `PermissionError` for anybody else,
        and `OSError` (EBADF) once it is closed.
        """
        if self._fd < 0:
            raise OSError(errno.EBADF, "this namespace is closed")
        if self.how == "user":
            raise PermissionError(errno.EPERM, "only root can enter a network namespace and return")
        back = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _libc("setns", self._fd, _CLONE_NEWNET)
            try:
                yield
            finally:
                _libc("setns", back, _CLONE_NEWNET)
        finally:
            os.close(back)


def _libc(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        raise OSError(errno.ENOSYS, "network namespaces are Linux only")
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        why = os.strerror(number)
        if number == errno.ENOSPC:  # user_namespaces(7)
            why = "the limit in /proc/sys/user/max_*_namespaces is reached"
        raise OSError(number, f"{name}: {why}")


def _unshare(uid: int) -> Literal["root", "user"]:
    try:
        _libc("unshare", _CLONE_NEWNET)
    except PermissionError:
        pass
    else:
        return "root"
    outside = os.geteuid(), os.getegid()
    try:
        _libc("unshare", _CLONE_NEWUSER | _CLONE_NEWNET)
        # user_namespaces(7): groups must be given up before a gid may be mapped.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {outside[0]} 1")
        Path("/proc/self/gid_map").write_text(f"{uid} {outside[1]} 1")
    except OSError as error:
        raise PermissionError(errno.EPERM, _why_refused(error)) from error
    return "user"


def _why_refused(error: OSError) -> str:
    why = "no private network namespace without root: "
    limit = Path("/proc/sys/user/max_user_namespaces")
    with suppress(OSError):
        if limit.read_text().strip() == "0":
            return f"{why}user namespaces are disabled here (user.max_user_namespaces is 0)"
    if error.errno == errno.EINVAL and len(os.listdir("/proc/self/task")) > 1:
        return f"{why}this process already has threads"
    if error.errno == errno.ENOSPC:
        return f"{why}{error.strerror}"
    return f"{why}this system does not allow user namespaces ({error.strerror})"


def _set_up(sysctls: Mapping[str, object]) -> None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            request = struct.pack("16sH22x", b"lo", 0)
            request = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request)
            flags = struct.unpack_from("=H", request, 16)[0] | _IFF_UP
            fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags))
    except PermissionError as error:
        # Some systems let anybody make a user namespace and then give it no rights (AppArmor).
        raise PermissionError(
            errno.EPERM, "the private network namespace was made, but gives no right to use it"
        ) from error
    for name, value in sysctls.items():
        sysctl(name, value)


def _unshare_net(sysctls: Mapping[str, object]) -> int:
    _libc("unshare", _CLONE_NEWNET)
    _set_up(sysctls)
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _in_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Call it in a thread that is thrown away, so that what it does to itself does not matter."""
    outcome: list[T] = []
    trouble: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(function(*arguments))
        except BaseException as error:
            trouble.append(error)

    thread = threading.Thread(target=run, name="timewait-namespace")
    thread.start()
    thread.join()
    if trouble:
        raise trouble[0]
    return outcome[0]


def _socket(family: int, kind: int, proto: int) -> socket.socket:
    return socket.socket(family, kind, proto)


class _Helper:
    """A process inside a user and network namespace that runs functions and hands out sockets.

    It ends when its end of the line is closed, be it by our death.
    """

    def __init__(self, sysctls: Mapping[str, object]) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._turn = threading.Lock()
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            f"from timewait.kernel.namespace import _serve; _serve({theirs.fileno()})"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program],
                executable="/proc/self/exe",  # also where its path is closed to this user
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us; it goes when we go
            )
        self.pid = self._process.pid
        try:
            self.call(isolate, sysctls)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()
        self._process.wait()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._turn:
            _tell(self._line, (function, arguments))
            ok, result = _hear(self._line)
        if not ok:
            raise result
        return result


def _serve(fd: int) -> None:
    line = socket.socket(fileno=fd)
    while True:
        try:
            function, arguments = _hear(line)
        except EOFError:
            return
        answer: tuple[bool, Any]
        try:
            if function is isolate:
                answer = True, isolate(sysctls=arguments[0])
            else:
                answer = True, function(*arguments)
        except Exception as error:
            answer = False, error
        _tell(line, answer)


def _tell(line: socket.socket, what: tuple[Any, Any]) -> None:
    """Send a pair; a socket or raw file in second place goes as a descriptor."""
    fds = []
    if isinstance(what[1], socket.socket | io.FileIO):
        sock = what[1]
        fds = [sock.fileno()]
        what = what[0], None
    try:
        message = pickle.dumps(what)
    except Exception as error:
        message = pickle.dumps((False, TypeError(f"cannot be sent: {error}")))
    socket.send_fds(line, [struct.pack("=Q", len(message))], fds)
    line.sendall(message)
    if fds:
        sock.close()


def _hear(line: socket.socket) -> tuple[Any, Any]:
    head, fds, _, _ = socket.recv_fds(line, 8, 1)
    while 0 < len(head) < 8:
        head += line.recv(8 - len(head)) or b"\0" * 8
    if not head:
        raise EOFError("the other process has ended")
    message = bytearray()
    (size,) = struct.unpack("=Q", head)
    while len(message) < size:
        part = line.recv(size - len(message))
        if not part:
            raise EOFError("the other process has ended")
        message += part
    first, second = pickle.loads(message)
    if fds:
        is_socket = stat.S_ISSOCK(os.fstat(fds[0]).st_mode)
        second = socket.socket(fileno=fds[0]) if is_socket else io.FileIO(fds[0], "r+")
        os.set_inheritable(fds[0], False)
    return first, second
