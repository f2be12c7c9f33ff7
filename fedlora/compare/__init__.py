"""Several methods on the same data at the same budget: which runs, what they amount to, how sure that is."""
