"""The empirical audit: attacks the private step with planted records and counts how often it wins.

Everything it finds is a lower bound on what leaks, at a stated power; the accountants give the upper bound.
"""
