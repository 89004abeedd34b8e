"""`python -m timewait.bench`, which loads for a third of a second and may be interrupted then."""

from timewait.cli import Command, answer


def _load() -> Command:
    from timewait.bench.command import command

    return command


if __name__ == "__main__":
    answer(_load, "python -m timewait.bench")
