"""What a run is told: the schema, and YAML that becomes it."""
