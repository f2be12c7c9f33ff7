"""The parts of `benchmarks/simulation.py`: what is run, by whom, and what becomes of the times."""
