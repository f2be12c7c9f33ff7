"""Where clients live, the bytes that travel, and whole runs."""
