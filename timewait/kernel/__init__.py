"""The machine's own kernel, seen and driven."""
