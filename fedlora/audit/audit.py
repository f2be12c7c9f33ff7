"""The whole audit of one claim: three tiers on what is shipped, and again on each broken implementation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from fedlora.audit.mutations import broken
from fedlora.audit.one_run import OneRunAudit, audit_one_run
from fedlora.audit.sampler_audit import SamplerAudit, audit_sampler
from fedlora.audit.step_audit import StepAudit, audit_steps
from fedlora.audit.trace import RATE, STEPS, Implementation, reference_sampling, traced
from fedlora.errors import ConfigError
from fedlora.privacy.accountants import epsilon
from fedlora.privacy.calibration import noise_multiplier
from fedlora.privacy.step import spent
from fedlora.values import Mechanism

CONFIDENCE = 0.99
"""Of each tier's lower bound, the one that is printed and that refutes a claim."""
LEAST_SHARE = 0.6
"""Of the mechanism's epsilon: a step audit that finds less is broken, or the noise is far too large."""
LEAST_CLAIM, MOST_CLAIM = 0.5, 50.0
"""Outside of these the canaries are too few, or hide each other, for LEAST_SHARE of the truth to be found."""


class Verdict(StrEnum):
    """What an audit may end with; never "private".

    TOO_WEAK: the step audit found so little that the audit is broken, or the noise is far too large.
    """

    NO_VIOLATION = "no violation found"
    REFUTED = "refuted"
    TOO_WEAK = "audit broken"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A budget, and the mechanism that keeps it at the reference rate and steps.

    mechanism_epsilon: by PLD; below `epsilon` where another accountant calibrated.
    """

    epsilon: float
    delta: float
    mechanism: Mechanism
    mechanism_epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """One implementation under attack."""

    step: StepAudit
    one_run: OneRunAudit
    sampler: SamplerAudit

    def refuting(self, claim: Claim) -> tuple[str, ...]:
        """The tiers that refute the claim."""
        red = {
            "step": self.step.lower_bound > claim.epsilon,
            "one-run": self.one_run.lower_bound > claim.epsilon,
            "sampler": self.sampler.refuted,
        }
        return tuple(name for name, is_red in red.items() if is_red)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """What was claimed, what the shipped implementation showed, and which broken ones the same audit refutes."""

    claim: Claim
    seed: int
    tiers: Tiers
    power: Mapping[str, Tiers]

    @property
    def verdict(self) -> Verdict:
        """The gate's word."""
        if self.tiers.refuting(self.claim):
            return Verdict.REFUTED
        weakest = LEAST_SHARE * self.claim.mechanism_epsilon
        return Verdict.TOO_WEAK if self.tiers.step.lower_bound < weakest else Verdict.NO_VIOLATION


def claim_of(
    target_epsilon: float, target_delta: float, max_grad_norm: float, accountant: str = "pld"
) -> Claim:
    """The budget, calibrated as a run's is, but for the reference rate and steps.

    Raises:
        ConfigError: the audit is not sharp enough for so small or large a claim; or no such accountant.
        PrivacyError: no noise keeps the budget.
    """
    if not LEAST_CLAIM <= target_epsilon <= MOST_CLAIM:
        raise ConfigError(
            f"privacy.target_epsilon {target_epsilon:g} is outside {LEAST_CLAIM:g} to {MOST_CLAIM:g}, where this "
            "audit is sharp; audit the same code at another claim: --set privacy.target_epsilon=1"
        )
    sampling = reference_sampling()
    sigma = noise_multiplier(target_epsilon, target_delta, sampling, STEPS, accountant)
    mechanism = Mechanism(max_grad_norm=max_grad_norm, noise_multiplier=sigma)
    event = spent(mechanism, sampling, STEPS)
    return Claim(
        epsilon=target_epsilon,
        delta=target_delta,
        mechanism=mechanism,
        mechanism_epsilon=epsilon([event], target_delta, "pld"),
    )


def attacked(implementation: Implementation, claim: Claim, seed: int) -> Tiers:
    """All tiers on one implementation; a second or two."""
    sampling = reference_sampling()
    trace = traced(implementation, claim.mechanism, sampling, seed)
    return Tiers(
        step=audit_steps(trace, RATE, claim.delta, CONFIDENCE),
        one_run=audit_one_run(trace, RATE, claim.delta, CONFIDENCE),
        sampler=audit_sampler(implementation.draw, sampling, implementation.noise(seed)),
    )


def audit(
    claim: Claim,
    seed: int,
    implementation: Implementation | None = None,
    *,
    power: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> AuditResult:
    """The shipped implementation, or the one given, against its claim; equal seeds give equal results.

    Args:
        claim: from `claim_of`.
        seed: of everything random: records, canaries, coins, draws, noise.
        implementation: to audit; broken ones for the power table are made from it.
        power: whether to attack those too, which takes ten times as long.
        tell: hears what is being attacked.
    """
    audited = implementation or Implementation()
    tell(f"auditing {audited.name}")
    tiers = attacked(audited, claim, seed)
    table = {}
    for mutant in broken(audited) if power else ():
        tell(f"power: {mutant.name}")
        table[mutant.name] = attacked(mutant, claim, seed)
    return AuditResult(claim=claim, seed=seed, tiers=tiers, power=table)
