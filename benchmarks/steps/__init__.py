"""The parts of benchmarks/private_step.py."""
