"""Check a real capture in which one acknowledgment was made one too high, and explain it."""

from pathlib import Path

from attrs import evolve

from timewait.check import check
from timewait.check.evidence import read

events = list(read(Path("tests/check/traces/loopback.pcap"), print))
at = next(i for i, event in enumerate(events) if event.flags == 0x10 and i > 4)
events[at] = evolve(events[at], ack=events[at].ack + 1)
print(check(events).explain())
