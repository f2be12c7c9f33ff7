"""Low-rank paths behind one table of functions."""
