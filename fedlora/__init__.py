"""fedlora: federated LoRA fine-tuning under record-level differential privacy."""
