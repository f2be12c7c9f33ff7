"""fedlora: federated LoRA fine-tuning under record-level differential privacy."""

import os

# flwr reads this once, when it is imported: nobody is reported to because a library does so by default.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
