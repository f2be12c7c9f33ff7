"""Pure tensor maths on factors and their changes: torch only, no I/O, no clock, no global randomness."""
