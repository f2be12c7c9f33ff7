"""The private step, its noise, its price and the ledger that limits it."""
