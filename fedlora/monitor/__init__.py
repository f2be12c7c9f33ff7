"""A read-only look at a run from afar: gRPC, metrics, and the client of both."""
