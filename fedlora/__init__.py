"""fedlora: federated LoRA fine-tuning under record-level differential privacy."""

import os

# Nobody is reported to because a library does so by default. flwr reads its switch once, when it is imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# gRPC's care of forks begins its threads again in every child, where they may abort before the child is what it was
# forked for: one of Ray's processes, say. No child of ours speaks gRPC. Read once too.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
