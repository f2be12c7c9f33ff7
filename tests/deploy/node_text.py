"""A data owner's node.yaml for a tiny model, as text; `client` stands in its first line."""

NODE = """\
client: site-0
data: {{source: files, train: {train}, text: sentence, label: topic, max_length: 16}}
declared_records: {records}
classes: [weather, music, kitchen]
model: {{name: {model}}}
task: {{kind: sequence-classification}}
lora: {{r: 2, lora_alpha: 2, target_modules: [query, value]}}
work: {{batch_size: 16, local_steps: 2, optimizer: {{name: sgd, lr: 1.0}}}}
ledger: {folder}/state/ledger.jsonl
budget: {{target_epsilon: 8.0, target_delta: 1.0e-5, max_participations: {participations}}}
max_grad_norm: 1.0
min_noise_multiplier: 0.3
"""


def node_text(folder: object, model: object, train: object, *, records: int, participations: int = 2) -> str:
    """records: declared. folder: where the ledger will lie."""
    return NODE.format(
        folder=folder, model=model, train=train, records=records, participations=participations
    )
