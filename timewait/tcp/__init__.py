"""The protocol: data and pure functions. No clock, no I/O, no asyncio, no logging."""
