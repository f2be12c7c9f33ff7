"""What a run tells trackers that people already use, beside its own rounds.jsonl."""
