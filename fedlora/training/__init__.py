"""One client, without transport: a model with LoRA, its tasks, one round of work."""
