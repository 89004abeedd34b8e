"""A port that was waited for: once its TIME_WAIT may be over, bind and listen may succeed."""

from collections.abc import Callable

import pytest

from timewait import Scenario
from timewait.check import check
from timewait.events import Called, Event, Restart


@pytest.mark.parametrize("observer", ["sock_diag", "sock_diag+capture"])
@pytest.mark.parametrize(("later", "conforms"), [(59.0, False), (60.5, True), (61.9, True)])
def test_a_server_that_starts_so_many_seconds_after_the_close(
    later: float, conforms: bool, observer: str, undisturbed: Callable[..., None]
) -> None:
    def started() -> None:
        run = Scenario.built_in("server-first", clients=1).run_sync(observer=observer)
        seen: list[Event] = list(run.events)
        closed = run.snapshots[-2].t
        for number, call in enumerate(("bind", "listen")):
            t = closed + later + number / 1000
            seen.append(Called(t, "server", call, ("127.0.0.1", run.port), began=t))
        seen.append(Restart(closed + later + 0.01, ok=True, free_after=0.0))
        verdict = check(seen)
        assert bool(verdict) is conforms, verdict.explain()

    undisturbed(started)
