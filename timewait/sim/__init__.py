"""An internet of modelled hosts, under an asyncio loop whose clock is virtual."""

from timewait.sim.host import Host
from timewait.sim.inside import LeavesSimulation
from timewait.sim.loop import Deadlock, Livelock, SimLoop, run
from timewait.sim.network import Fault, Link, Network, Observer
from timewait.sim.socket import SimSocket, WouldBlockForever, current_host

__all__ = [
    "Deadlock",
    "Fault",
    "Host",
    "LeavesSimulation",
    "Link",
    "Livelock",
    "Network",
    "Observer",
    "SimLoop",
    "SimSocket",
    "WouldBlockForever",
    "current_host",
    "run",
]
