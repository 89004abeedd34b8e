"""An internet of modelled hosts, under an asyncio loop whose clock is virtual."""
