"""The report of a run: one HTML file that needs nothing else, and nothing from the network."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fedlora.config.load import dump_config
from fedlora.config.method import title_of
from fedlora.config.schema import RunConfig
from fedlora.disk import write_durably
from fedlora.errors import ConfigError
from fedlora.export.card import data_source, targets_text
from fedlora.export.page import folded, page, pairs
from fedlora.export.report_adapter import what_the_adapter_is
from fedlora.export.report_clients import accuracy_told, epsilon_by_client
from fedlora.export.report_clipping import clipping
from fedlora.export.report_lengths import lengths_by_round
from fedlora.export.report_participation import participation_by_client
from fedlora.export.report_partition import partition_picture
from fedlora.export.report_samples import what_it_says
from fedlora.export.report_score import score_over_rounds
from fedlora.export.report_signal import signal_by_client
from fedlora.export.report_staleness import staleness_by_client
from fedlora.export.statement import NOT_PRIVATE, privacy_statement, reservation
from fedlora.export.words import bytes_text, duration, epsilon, nothing_learnt, number, score
from fedlora.privacy.noise import BY_THE_NODES


def write_report(
    target: Path,
    summary: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    config: RunConfig,
    *,
    diagnostics: Mapping[str, Any] | None = None,
    picture: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
) -> None:
    """The report is in `target`, whole; ConfigError where it cannot be. For the arguments see `report_html`."""
    words = report_html(summary, rounds, config, diagnostics=diagnostics, picture=picture, samples=samples)
    try:
        write_durably(target, words)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror}); name another file") from None


def report_html(
    summary: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    config: RunConfig | None = None,
    *,
    diagnostics: Mapping[str, Any] | None = None,
    picture: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A self-contained page: key figures, score curve, the clients, signal and noise, the adapter, the promise.

    Args:
        summary: as in summary.json.
        rounds: as in rounds.jsonl, oldest first; may be empty.
        config: adds the target epsilon, the data and the whole config, if given.
        diagnostics: as in diagnostics.json; None: nothing is said of the adapter.
        picture: as in partition.json; None: who holds what is not shown.
        samples: as in samples.jsonl; empty: nothing is shown.
    """
    title = f"{_method(summary)}, {summary['clients']} clients, {summary['rounds_completed']} rounds"
    target = _target(summary, config)
    parts = [
        _head(summary, config),
        _figures(summary, target),
        _learnt(summary),
        score_over_rounds(summary, rounds),
        accuracy_told(rounds),
    ]
    parts += [
        epsilon_by_client(summary, target),
        partition_picture(picture),
        participation_by_client(summary, rounds),
        staleness_by_client(summary, rounds),
        signal_by_client(rounds),
        lengths_by_round(rounds),
        clipping(rounds, config),
        what_it_says(samples),
        what_the_adapter_is(diagnostics),
        _statement(summary),
    ]
    return page(title, [part for part in [*parts, _config(summary, config), _made_with(summary)] if part])


def _target(summary: Mapping[str, Any], config: RunConfig | None) -> float | None:
    """What the config asked for, a figure beside what the ledgers say; None where each node has its own."""
    if config is None or config.privacy == "none" or summary["noise_source"] == BY_THE_NODES:
        return None
    return config.privacy.target_epsilon


def _head(summary: Mapping[str, Any], config: RunConfig | None) -> str:
    what = (
        "Federated LoRA"
        if config is None
        else f"{config.model.name} on {data_source(config).replace('`', '')}"
    )
    flags = [f'<span class="flag{"" if summary["private"] else " warn"}">{escape(_flag(summary))}</span>']
    if summary["private"] and (taken_back := reservation(summary)) is not None:
        flags.append(f'<span class="flag warn">{taken_back}</span>')
    if config is not None and summary["rounds_completed"] < config.federation.rounds:
        flags.append(f'<span class="flag warn">not finished: {_rounds_of(summary, config)}</span>')
    heading = f"<h1>{escape(_method(summary))}: report of a run</h1>"
    return f'{heading}\n<p class="lead">{escape(what)}</p>\n<p>{"".join(flags)}</p>'


def _method(summary: Mapping[str, Any]) -> str:
    return title_of(summary["method"])


def _rounds_of(summary: Mapping[str, Any], config: RunConfig) -> str:
    return f"{summary['rounds_completed']} of {config.federation.rounds} rounds"


def _flag(summary: Mapping[str, Any]) -> str:
    if not summary["private"]:
        return NOT_PRIVATE
    spent = epsilon(summary["epsilon_max"])
    return f"differentially private: epsilon {spent} at delta {number(summary['delta'])}"


def _figures(summary: Mapping[str, Any], target: float | None) -> str:
    metric = str(summary["metric"])
    spent = epsilon(summary["epsilon_max"]) if summary["private"] else "none"
    of = f"at delta {number(summary['delta'])}" + ("" if target is None else f", target {number(target)}")
    both_ways = (summary["bytes_up_per_client_round"], summary["bytes_down_per_client_round"])
    figures = (
        (
            f"Test {metric}",
            score(metric, summary["score"]),
            f"{score(metric, summary['score_before'])} before training",
        ),
        *_personal(metric, summary),
        ("Largest epsilon", spent, of if summary["private"] else NOT_PRIVATE),
        ("Rounds", str(summary["rounds_completed"]), f"{summary['clients']} clients"),
        (
            "Time of the rounds",
            duration(summary["seconds"]),
            f"{number(summary['client_rounds_per_second'])} client rounds a second",
        ),
        ("Sent by a client", bytes_text(both_ways[0]), "a round"),
        ("Received by a client", bytes_text(both_ways[1]), "a round"),
    )
    cells = (
        f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd><small>{escape(s)}</small></div>"
        for n, v, s in figures
    )
    return f'<dl class="figures">\n{"".join(cells)}\n</dl>'


def _learnt(summary: Mapping[str, Any]) -> str:
    """What to try next, where nothing was learnt."""
    if (next_move := nothing_learnt(summary)) is None:
        return ""
    return f'<div class="statement warn"><p>Learnt: {escape(next_move)}.</p></div>'


def _personal(metric: str, summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """How clients' own models do, where each keeps its B."""
    if not summary.get("personal"):
        return []
    return [
        ("Personal models", score(metric, summary["personal_mean"]), f"mean of {len(summary['personal'])}")
    ]


def _statement(summary: Mapping[str, Any]) -> str:
    statement = privacy_statement(summary)
    warn = "" if summary["private"] and reservation(summary) is None else " warn"
    outside = "".join(f"<li>{escape(line)}</li>" for line in statement.not_protected)
    outside = f"<h3>Not protected</h3>\n<ul>{outside}</ul>" if outside else ""
    heading = f'<h2 class="promise">Privacy statement: {escape(statement.heading)}</h2>'
    return f'{heading}\n<div class="statement{warn}">\n{pairs(statement.terms)}\n{outside}\n</div>'


def _config(summary: Mapping[str, Any], config: RunConfig | None) -> str:
    if config is None:
        return f"<h2>Method</h2>\n{pairs([('Method', _method(summary))])}"
    rounds, lora = config.federation, config.lora
    rows = (
        ("Method", f"{_method(summary)}, {_stale(config)}"),
        ("Adapter", f"LoRA r {lora.r}, alpha {number(lora.lora_alpha)}, on {targets_text(config)}"),
        (
            "Local work",
            f"{rounds.local_steps} step{'' if rounds.local_steps == 1 else 's'}, expected batch {rounds.batch_size}",
        ),
        ("Optimizer", f"{rounds.optimizer.name}, learning rate {number(rounds.optimizer.lr)}"),
        ("Partition", config.data.partition.kind),
        ("Runtime", str(summary["execution"])),
    )
    whole = folded("The whole config", f"<pre>{escape(dump_config(config))}</pre>")
    return f"<h2>Method</h2>\n{pairs(rows)}\n{whole}"


def _stale(config: RunConfig) -> str:
    stale = config.method.stale
    if stale.rule == "mifa":
        return "MIFA"
    return f"FedStale beta {stale.beta if isinstance(stale.beta, str) else number(stale.beta)}"


def _made_with(summary: Mapping[str, Any]) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in sorted(summary["versions"].items()))]
    if summary["state_sha256"]:
        lines.append(f"Final state SHA-256 {summary['state_sha256']}")
    return f"<footer>{'<br>'.join(escape(line) for line in lines)}</footer>"
