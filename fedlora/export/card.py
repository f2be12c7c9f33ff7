"""The model card that travels with an exported adapter."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedlora.config.data import Files, HuggingFace
from fedlora.config.method import title_of
from fedlora.config.schema import RunConfig
from fedlora.export.report_clients import CLIENT_HEADS, MOST_ROWS, client_rows, dearest
from fedlora.export.statement import Statement, began_text, privacy_statement
from fedlora.export.words import number, score

PIPELINES = {"sequence-classification": "text-classification", "image-classification": "image-classification"}
"""What model hubs call a task; the others generate text."""


def model_card(config: RunConfig, summary: Mapping[str, Any], *, merged: bool = False) -> str:
    """Markdown: front matter that model hubs read, the privacy statement, how to load the files beside it.

    Args:
        config: of the run.
        summary: as in summary.json.
        merged: the card goes with a whole model, not with an adapter.
    """
    statement = privacy_statement(summary)
    parts = [
        _front_matter(config, merged),
        _title(config, statement),
        _usage(config, merged),
        _training(config, summary),
    ]
    return "\n".join([*parts, _privacy(statement, summary), _versions(summary)])


def data_source(config: RunConfig) -> str:
    """The training data in words, without a path of this machine."""
    data = config.data
    if isinstance(data, Files):
        return f"local file {_code(data.train.replace(chr(92), '/').rpartition('/')[2])}"
    if isinstance(data, HuggingFace):
        name = " ".join(filter(None, [data.path, data.name]))
        return f"data set {_code(name)}, split {_code(data.train_split)}"
    return "docstrings of installed Python packages; the label is the package"


def _front_matter(config: RunConfig, merged: bool) -> str:
    pipeline = PIPELINES.get(config.task.kind, "text-generation")
    tags = "\n".join(f"- {tag}" for tag in ("fedlora", "lora", "federated-learning", "differential-privacy"))
    base = "" if _is_path(config.model.name) else f"base_model: {config.model.name}\n"
    tags = tags if config.privacy != "none" else tags.replace("\n- differential-privacy", "")
    library = "transformers" if merged else "peft"
    return f"---\nlibrary_name: {library}\n{base}pipeline_tag: {pipeline}\ntags:\n{tags}\n---\n"


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or not name.replace("/", "").strip()


def _title(config: RunConfig, statement: Statement) -> str:
    return (
        f"# {config.model.name}, fine-tuned by federated LoRA\n\nTrained by fedlora over the "
        f"records of several owners that never left them. Privacy: **{statement.heading}**.\n"
    )


def _usage(config: RunConfig, merged: bool) -> str:
    """Python that loads what lies beside the card and, for a classifier, uses it."""
    if config.task.kind == "image-classification":
        return _usage_on_images(config, merged)
    classifies = not config.task.causal
    auto = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
    here, name = 'here = "."  # the directory of this card', repr(config.model.name)
    if merged:
        lines = [f"from transformers import {auto}, AutoTokenizer", "", here]
        lines += [f"model = {auto}.from_pretrained(here).eval()"]
        lines += ["tokenizer = AutoTokenizer.from_pretrained(here)"]
    else:
        lines = ["import json", "from pathlib import Path", ""] if classifies else []
        lines += ["from peft import PeftModel", f"from transformers import {auto}, AutoTokenizer", "", here]
        lines += [f"name = {name}"]
        lines += ["# without the hub: from fedlora.training.checkpoints import locate; name = locate(name)"]
        lines += ['classes = json.loads(Path(here, "classes.json").read_text())'] if classifies else []
        labels = ", num_labels=len(classes)" if classifies else ""
        lines += [f"base = {auto}.from_pretrained(name{labels})"]
        lines += ["model = PeftModel.from_pretrained(base, here).eval()"]
        lines += ["tokenizer = AutoTokenizer.from_pretrained(name)"]
    if classifies:
        label = "model.config.id2label[best]" if merged else "classes[best]"
        cut = f"truncation=True, max_length={config.data.max_length}"
        lines += ["", f'tokens = tokenizer("A text.", {cut}, return_tensors="pt")']
        lines += ["best = model(**tokens).logits.argmax().item()", f"print({label})"]
    elif (prompt := _prompt(config)) is not None:
        lines += ["", f'tokens = tokenizer({prompt!r}, return_tensors="pt", return_token_type_ids=False)']
        lines += ["said = model.generate(**tokens, max_new_tokens=40)", "print(tokenizer.decode(said[0]))"]
    note = "transformers reports the classifier as missing from the base model: the adapter brings it.\n"
    shown = "\n".join(lines)
    return f"## Use\n\n```python\n{shown}\n```\n" + (f"\n{note}" if classifies and not merged else "")


def _prompt(config: RunConfig) -> str | None:
    """How a prompt is written for this model, where the tokenizer's chat template does not say."""
    template = getattr(config.task, "template", None)
    if getattr(config.data, "messages", None) is not None or template == "chat":
        return None
    return template.replace("{prompt}", "A prompt") if template and "{prompt}" in template else "A prompt"


def _usage_on_images(config: RunConfig, merged: bool) -> str:
    """How to load a model that looks at images."""
    imports = "AutoImageProcessor, AutoModelForImageClassification"
    lines = [
        "from PIL import Image",
        f"from transformers import {imports}",
        "",
        'here = "."  # the directory of this card',
    ]
    if merged:
        lines += ["name = here", "model = AutoModelForImageClassification.from_pretrained(here).eval()"]
    else:
        lines = ["import json", "from pathlib import Path", "", "from peft import PeftModel", *lines]
        lines += [
            f"name = {config.model.name!r}",
            'classes = json.loads(Path(here, "classes.json").read_text())',
        ]
        lines += ["base = AutoModelForImageClassification.from_pretrained("]
        lines += ["    name, num_labels=len(classes), ignore_mismatched_sizes=True", ")"]
        lines += ["model = PeftModel.from_pretrained(base, here).eval()"]
    lines += ["processor = AutoImageProcessor.from_pretrained(name)", ""]
    lines += ['pixels = processor(Image.open("image.png").convert("RGB"), return_tensors="pt")']
    lines += ["best = model(**pixels).logits.argmax().item()"]
    lines += [f"print({'model.config.id2label[best]' if merged else 'classes[best]'})"]
    shown = "\n".join(lines)
    return f"## Use\n\n```python\n{shown}\n```\n"


def _training(config: RunConfig, summary: Mapping[str, Any]) -> str:
    metric, method = str(summary["metric"]), title_of(summary["method"])
    rows = (
        ("Base model", _base(config)),
        (
            "Method",
            f"{method}, LoRA r {config.lora.r}, alpha {number(config.lora.lora_alpha)}",
        ),
        *((("Whose B", _code(of_client)),) if (of_client := summary.get("of_client")) else ()),
        ("Adapted layers", _code(targets_text(config))),
        *((("Began from", began_text(summary)),) if summary.get("began_from") else ()),
        ("Data", data_source(config)),
        ("Clients", f"{summary['clients']}, partition {config.data.partition.kind}"),
        ("Rounds", f"{summary['rounds_completed']} of {config.federation.rounds}"),
        (
            "Local work",
            f"{config.federation.local_steps} steps, expected batch {config.federation.batch_size}",
        ),
        (
            f"Test {metric}",
            f"{score(metric, summary['score_before'])} before, {score(metric, summary['score'])} after",
        ),
    )
    return f"## Training\n\n{_table(rows)}\n"


def targets_text(config: RunConfig) -> str:
    """The layers that are adapted, and the ranks that are not the run's."""
    lora = config.lora
    names = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
    other = ", ".join(f"{key}: {r}" for key, r in (lora.rank_pattern or {}).items())
    return ", ".join(names) + (f"; other ranks: {other}" if other else "")


def _base(config: RunConfig) -> str:
    bits = config.model.quantization
    rounded = "" if bits == "none" else f", whose layers were in {bits} while it was trained and scored"
    return f"{_code(config.model.name)}{rounded}"


def _privacy(statement: Statement, summary: Mapping[str, Any]) -> str:
    text = f"## Privacy: {statement.heading}\n\n{_table(statement.terms)}\n"
    if not summary["private"]:
        return text
    outside = "\n".join(f"- {line}" for line in statement.not_protected)
    rows = client_rows(summary, sorted(dearest(summary, MOST_ROWS)))
    clients = _table([(_code(client), *figures) for client, *figures in rows], CLIENT_HEADS)
    more = len(summary["epsilon_by_client"]) - len(rows)
    clients += f"\n\nThese spent most; each of {more:,} more spent no more than any of them." if more else ""
    return f"{text}\n### epsilon by client\n\n{clients}\n\n### Not protected\n\n{outside}\n"


def _versions(summary: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in sorted(summary["versions"].items()))
    state = summary["state_sha256"]
    return f"## Made with\n\n{versions}.{f' Final state SHA-256 `{state}`.' if state else ''}\n"


def _table(rows: Iterable[Sequence[str]], heads: Sequence[str] = ("", "")) -> str:
    lines = [f"| {' | '.join([row[0], *map(_cell, row[1:])])} |" for row in rows]
    return "\n".join([f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    """Inline code whose text cannot end the code, the cell or become HTML."""
    return f"`{text.replace('`', chr(39)).replace('|', '/').replace(chr(10), ' ')}`"
