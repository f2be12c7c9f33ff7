"""The command that attacks: audit."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlora.cli.output import ConfigArgument, Format, FormatOption, SetOption, only_ours, pairs, show, table
from fedlora.errors import ConfigError, FedLoraError, PrivacyError

if TYPE_CHECKING:
    from fedlora.audit.audit import AuditResult, Tiers


def add_to(app: typer.Typer) -> None:
    """The app knows this command."""
    app.command("audit", short_help="Attack the private step and compare with the claim.")(audit)


def audit(
    config: ConfigArgument,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, help="Of the attack. [default: the config's]", show_default=False),
    ] = None,
    overrides: SetOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out the broken implementations: no power is measured.")
    ] = False,
    form: FormatOption = Format.TEXT,
) -> None:
    """Attack the private step with planted records, at the config's budget; half a minute.

    Synthetic records only: no data is read and no ledger is touched. Ends with status 3 if the claim is refuted.
    """
    from fedlora.config.load import load_config
    from fedlora.config.located import located

    loaded = load_config(config, overrides or [])
    privacy = loaded.privacy
    if privacy == "none":
        raise ConfigError(
            f"{config}: privacy: none claims nothing that an audit could refute; give it a budget, "
            "for example --set 'privacy={target_epsilon: 8, target_delta: 1.0e-5, max_grad_norm: 1.0, "
            "max_participations: 20}'"
        )
    from fedlora.audit.audit import audit as attack
    from fedlora.audit.audit import claim_of
    from fedlora.audit.trace import Implementation
    from fedlora.cli.progress import watching
    from fedlora.federation.events import Stage
    from fedlora.kernels import torch_ops
    from fedlora.runtime.host import engine_of

    with located(config, overrides or []), only_ours(), watching() as listener:
        result = attack(
            claim_of(privacy.target_epsilon, privacy.target_delta, privacy.max_grad_norm, privacy.accountant),
            loaded.seed if seed is None else seed,
            Implementation(engine=engine_of(privacy, torch_ops)),
            power=not quick,
            tell=lambda what: listener(Stage(name=what)),
        )
    show(audit_json(result), audit_text(config, result), form)
    require_passed(result)


def require_passed(result: "AuditResult") -> None:
    """Passes only an audit that found no violation and would have found one.

    Raises:
        PrivacyError: the claim is refuted. FedLoraError: the audit found too little to be working.
    """
    from fedlora.audit.audit import LEAST_SHARE, Verdict

    claimed, found = result.claim.epsilon, result.tiers.step.lower_bound
    if result.verdict is Verdict.REFUTED:
        tiers = ", ".join(result.tiers.refuting(result.claim))
        raise PrivacyError(
            f"the claim of epsilon {claimed:g} is refuted ({tiers}; step audit: at least {found:.4g}); "
            "release nothing that this code trained, and run the tests of tests/privacy to find the broken piece"
        )
    if result.verdict is Verdict.TOO_WEAK:
        raise FedLoraError(
            f"the step audit found {found:.4g}, below {LEAST_SHARE:g} of {result.claim.mechanism_epsilon:.4g}: "
            "the audit is broken or the noise is far too large; try another --seed, then run tests/audit"
        )


def audit_json(result: "AuditResult") -> dict[str, Any]:
    """All that was measured. `lower_bound` is the step audit's; no number here is "the" epsilon."""
    from fedlora.audit.audit import CONFIDENCE
    from fedlora.audit.canaries import CANARIES, REAL_RECORDS
    from fedlora.audit.sampler_audit import LIMIT
    from fedlora.audit.trace import CLIENTS, RATE, STEPS

    claim, tiers = result.claim, result.tiers
    return {
        "claimed": claim.epsilon,
        "delta": claim.delta,
        "lower_bound": tiers.step.lower_bound,
        "confidence": CONFIDENCE,
        "verdict": str(result.verdict),
        "refuted_by": list(tiers.refuting(claim)),
        "seed": result.seed,
        "audited_at": {
            "steps": STEPS,
            "sample_rate": RATE,
            "noise_multiplier": claim.mechanism.noise_multiplier,
            "max_grad_norm": claim.mechanism.max_grad_norm,
            "mechanism_epsilon": claim.mechanism_epsilon,
            "clients": len(CLIENTS),
            "real_records": REAL_RECORDS,
            "canaries": CANARIES,
        },
        "tiers": {
            "step": {
                "lower_bound": tiers.step.lower_bound,
                "sharpest_test": tiers.step.worst,
                "claimed_mu": tiers.step.claimed_mu,
                "mu": dict(tiers.step.mu),
            },
            "one_run": {
                "lower_bound": tiers.one_run.lower_bound,
                "f_dp": tiers.one_run.f_dp,
                "canaries": tiers.one_run.canaries,
                "guesses": tiers.one_run.guesses,
                "correct": tiers.one_run.correct,
            },
            "sampler": {"limit": LIMIT, "scores": dict(tiers.sampler.scores)},
        },
        "power": {
            name: {
                "lower_bound": broken.step.lower_bound,
                "sharpest_test": broken.step.worst,
                "one_run": broken.one_run.lower_bound,
                "sampler": broken.sampler.scores[broken.sampler.worst],
                "refuted_by": list(broken.refuting(claim)),
            }
            for name, broken in result.power.items()
        },
    }


def audit_text(config: Path, result: "AuditResult") -> str:
    """What was claimed, what was found, and what the same attack finds in broken implementations."""
    from fedlora.audit.audit import CONFIDENCE
    from fedlora.audit.sampler_audit import LIMIT
    from fedlora.audit.trace import RATE, STEPS

    claim, tiers = result.claim, result.tiers
    sampler = tiers.sampler
    one_run = f"at least {tiers.one_run.lower_bound:.2f} ({tiers.one_run.f_dp:.2f} if the run is Gaussian)"
    guesses = f"{tiers.one_run.correct} of {tiers.one_run.guesses} guesses right"
    refuted = [name for name, broken in result.power.items() if broken.refuting(claim)]
    verdict = str(result.verdict)
    if result.power:
        verdict += f", where {len(refuted)} of {len(result.power)} broken implementations are refuted"
    rows = [
        ("claim", f"epsilon {claim.epsilon:g} at delta {claim.delta:g}"),
        (
            "audited at",
            f"{STEPS} steps, rate {RATE:g}, noise multiplier {claim.mechanism.noise_multiplier:g}",
        ),
        ("step audit", f"epsilon is at least {tiers.step.lower_bound:.2f} ({CONFIDENCE:.0%} sure)"),
        ("one-run audit", f"{one_run}: {guesses}"),
        (
            "sampler audit",
            f"largest score {sampler.scores[sampler.worst]:+.1f} ({sampler.worst}), limit {LIMIT:g}",
        ),
        ("verdict", verdict),
    ]
    return "\n".join([f"{config}", pairs(rows), "", _power_table(result), "", *_NOTES])


_NOTES = (
    "  Audited is the private step of this code at a reference size, with the config's own budget and bound;",
    "  not the config's model, data or number of rounds.",
    "  A lower bound is what this attack could show, never the epsilon: that is the accountant's upper bound.",
    "  A pass says that no violation was found at this power. It does not prove privacy.",
)


def _power_table(result: "AuditResult") -> str:
    if not result.power:
        return "  power not measured; leave --quick out to see which broken implementations would be refuted"
    heads = ("power: broken implementation", "step", "one-run", "sampler", "refuted by")
    return table(heads, [_power_row(name, broken, result) for name, broken in result.power.items()])


def _power_row(name: str, broken: "Tiers", result: "AuditResult") -> tuple[str, ...]:
    found = broken.refuting(result.claim)
    by = ", ".join(f"step ({broken.step.worst})" if tier == "step" else tier for tier in found)
    return (
        name,
        f"{broken.step.lower_bound:.2f}",
        f"{broken.one_run.lower_bound:.2f}",
        f"{broken.sampler.scores[broken.sampler.worst]:+.1f}",
        by or "nothing",
    )
