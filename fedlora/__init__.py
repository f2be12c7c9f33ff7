"""fedlora: federated LoRA fine-tuning under record-level differential privacy."""

import os

# Each of these is read once, when the library is imported. Nobody is reported to because a library does so by default.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# gRPC's care of forks begins its threads again in every child, where they may abort before the child is what it was
# forked for: one of Ray's processes, say. No child of ours speaks gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
