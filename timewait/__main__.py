"""`python -m timewait` is the `timewait` command."""

from timewait.cli import main

if __name__ == "__main__":
    main()
