"""What a run leaves for others: adapters, model cards, reports."""
