"""The kernel tells which transitions began in a process and in what descends from it."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from timewait.events import Transition
from timewait.kernel import tracefs
from timewait.kernel.lineage import Lineage
from timewait.kernel.tracepoint import Tracepoint
from timewait.tcp.states import State

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root (tracefs)"),
    pytest.mark.skipif(
        sys.platform == "linux" and not tracefs.in_first_pid_namespace(),
        reason="the kernel knows processes by other numbers than are seen in this PID namespace",
    ),
]


def test_each_listener_and_each_call_of_this_process_is_told_once() -> None:
    lineage = Lineage(lambda: [os.getpid()])
    try:
        with Tracepoint(start=0.0) as tracepoint:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                calls = [socket.create_connection(listener.getsockname()) for _ in range(50)]
                ends = [call.getsockname() for call in calls]
                for call in calls:
                    call.close()
            events = [each for each in tracepoint.read() if isinstance(each, Transition)]
        own = lineage.among(events)
        assert [each.local for each in own if each.new is State.SYN_SENT] == ends
        assert len(own) == 51
        assert lineage.among(events) == []
        assert lineage.lost == 0
    finally:
        lineage.close()


def test_nothing_is_left_of_it() -> None:
    with Tracepoint([1]) as tracepoint:

        def ours() -> set[str]:
            names = {each.name for each in tracepoint.home.parent.iterdir()}
            return {name for name in names if f"-{os.getpid()}-" in name}

        before = ours()
        lineage = Lineage(lambda: [os.getpid()])
        assert len(ours() - before) == 1
        lineage.close()
        assert ours() == before
