"""What lies in a run's directory, simulated or served, and what may be said of it."""
