"""Simulated clients that come, go and take their time, by a clock that nobody has to wait for."""
