"""fedlora: federated LoRA fine-tuning under record-level differential privacy."""

import os

# Nobody is reported to because a library does so by default. flwr reads its switch once, when it is imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
