"""The server, without transport: plan, ask, absorb, store."""
