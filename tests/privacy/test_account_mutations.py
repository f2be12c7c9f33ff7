"""Each line of the accounts that matters, broken on purpose, makes the check fail that is named beside it."""

import pytest

from . import account_checks
from .mutants import ACCOUNTS, Mutation, mutated

TABLE = "the_reference_table_holds"
AGREE = "both_accountants_agree"
STOP = "accountants_that_differ_stop_the_run"
CUT = "draws_cut_at_their_cap_are_paid"
COMPOSE = "rounds_compose_like_one_run"
MIXED = "two_mechanisms_compose_as_an_outside_accountant_says"
CLT = "the_clt_accountant_is_unreachable"
DELTA = "delta_stays_below_one_record"
BUDGET = "calibrated_noise_keeps_the_budget"
UNSAMPLED = "without_sampling_it_is_the_analytic_gaussian"
LOSSES = "a_sampled_step_loses_what_the_library_says"
MUTATIONS = (
    Mutation("pld: 3 % more noise than there is", "accountants", "sampled_losses(event.noise_multiplier",
             "sampled_losses(1.03 * event.noise_multiplier", AGREE),
    Mutation("pld: half of the steps", "accountants", "step.self_compose(event.steps)",
             "step.self_compose(max(1, event.steps // 2))", AGREE),
    Mutation("pld: a smaller rate", "accountants", "event.sample_rate, grid", "0.97 * event.sample_rate, grid",
             AGREE),
    Mutation("pld: sampled losses one way only", "sampled_losses", "(AdjacencyType.REMOVE, AdjacencyType.ADD)",
             "(AdjacencyType.ADD, AdjacencyType.ADD)", "both_directions_are_bounded"),
    Mutation("pld: and the other way only", "sampled_losses", "(AdjacencyType.REMOVE, AdjacencyType.ADD)",
             "(AdjacencyType.REMOVE, AdjacencyType.REMOVE)", LOSSES),
    Mutation("pld: great losses cut off", "sampled_losses", "math.ceil(bounds.epsilon_upper / grid)",
             "math.ceil(0.5 * bounds.epsilon_upper / grid)", LOSSES),
    Mutation("pld: losses on one side cut off", "sampled_losses", "math.floor(bounds.epsilon_lower / grid)",
             "math.floor(0.5 * bounds.epsilon_lower / grid)", LOSSES),
    Mutation("pld: nothing is lost beyond the limit", "sampled_losses", "    if removed:  # no", "    if False:  # no",
             LOSSES),
    Mutation("pld: no limit", "sampled_losses", "inside = sign * epsilons > least",
             "inside = np.full(epsilons.shape, True)", LOSSES),
    Mutation("pld: lost as if always drawn", "sampled_losses", " - math.log(loss.sampling_prob)", "", LOSSES),
    Mutation("pld: lost as if nobody else were drawn", "sampled_losses",
             " + np.log(-np.expm1(least - sign * asked))", "", LOSSES),
    Mutation("pld: outcomes from the other neighbour's", "sampled_losses", "(-0.5 if removed else 0.5)",
             "(0.5 if removed else -0.5)", LOSSES),
    Mutation("pld: outcomes in other units", "sampled_losses", "whole * sigma**2", "whole * sigma", LOSSES),
    Mutation("pld: outcomes a little off", "sampled_losses", "whole = sign * asked", "whole = 1.0001 * sign * asked",
             LOSSES),
    Mutation("pld: outcomes mirrored", "sampled_losses", "- sign * whole", "+ sign * whole", LOSSES),
    Mutation("pld: outcomes counted without their losses", "sampled_losses",
             "- np.exp(epsilons + loss", "- np.exp(loss", LOSSES),
    Mutation("pld: deltas below nothing", "sampled_losses", "np.clip(more, 0, 1)", "more", LOSSES),
    Mutation("replace-one: sampled steps as add-remove", "accountants", "grid, relation)",
             "grid, NeighboringRelation.ADD_OR_REMOVE_ONE)", TABLE),
    Mutation("replace-one: as if a record were removed", "sampled_losses", "(AdjacencyType.REPLACE,) if",
             "(AdjacencyType.REMOVE,) if", TABLE),
    Mutation("replace-one: a smaller alpha", "sampled_losses", "inner = 0.5 / sigma**2 + ", "inner = ", LOSSES),
    Mutation("replace-one: a larger alpha", "sampled_losses", "math.log1p(-rate) - math.log(rate) + sinh",
             "-math.log(rate) + sinh", LOSSES),
    Mutation("replace-one: no rate", "sampled_losses", " - math.log(rate) + sinh", " + sinh", LOSSES),
    Mutation("replace-one: a sinh that is an exponential", "sampled_losses",
             "half + np.log(-np.expm1(-2 * half)) - math.log(2)", "half - math.log(2)", LOSSES),
    Mutation("replace-one: a sinh twice as large", "sampled_losses", " - math.log(2)", "", LOSSES),
    Mutation("replace-one: an asinh that is a logarithm", "sampled_losses",
             "np.logaddexp(0.5 * np.logaddexp(0, 2 * inner), inner)", "inner + math.log(2)", LOSSES),
    Mutation("replace-one: outcomes without their own loss", "sampled_losses", "(asinh + half)", "asinh", LOSSES),
    Mutation("replace-one: outcomes mirrored", "sampled_losses", "return -np.sign(epsilons)",
             "return np.sign(epsilons)", LOSSES),
    Mutation("replace-one: outcomes in other units", "sampled_losses", "(asinh + half) * sigma**2",
             "(asinh + half) * sigma", LOSSES),
    Mutation("pld: the last event only", "accountants", "total = total.compose(pld)", "total = pld", AGREE),
    Mutation("pld: rounded down, unsampled", "accountants", "pessimistic_estimate=True",
             "pessimistic_estimate=False", UNSAMPLED),
    Mutation("pld: unsampled steps counted once", "accountants",
             "standard_deviation=event.noise_multiplier / math.sqrt(event.steps)",
             "standard_deviation=event.noise_multiplier", UNSAMPLED),
    Mutation("pld: 1 % more noise than there is, unsampled", "accountants",
             "standard_deviation=event.noise_multiplier", "standard_deviation=1.01 * event.noise_multiplier",
             UNSAMPLED),
    Mutation("replace-one: unsampled steps as add-remove", "accountants", "neighboring_relation=relation",
             "neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE", UNSAMPLED),
    Mutation("pld: one direction, the smaller", "accountants",
             "return float(total.get_epsilon_for_delta(delta))",
             "import dp_accounting.pld.privacy_loss_distribution as p; "
             "return float(total._pmf_add.get_epsilon_for_delta(delta))", "both_directions_are_bounded"),
    Mutation("replace-one as add-remove", "accountants", "NeighboringRelation.REPLACE_ONE\n",
             "NeighboringRelation.ADD_OR_REMOVE_ONE\n", TABLE),
    Mutation("prv: 5 % short", "accountants", "return float(accountant.get_epsilon(delta, eps_error=error))",
             "return 0.95 * float(accountant.get_epsilon(delta, eps_error=error))", AGREE),
    Mutation("prv: its coarse error where epsilon is small", "accountants", "if value < 20 * PRV_ERROR:",
             "if False:", AGREE),
    Mutation("rdp by the central limit", "accountants", "    accountant: Any = RDPAccountant()",
             "    from opacus.accountants import GaussianAccountant\n"
             "    accountant: Any = GaussianAccountant()", TABLE),
    Mutation("the central limit offered", "accountants", 'if accountant not in ("pld", "prv", "rdp"):',
             'if accountant not in ("pld", "prv", "rdp", "gdp"):', CLT),
    Mutation("unknown names mean pld", "accountants",
             "    _require_known(accountant, adjacency)\n    if not 0",
             '    accountant = accountant if accountant in ("pld", "prv", "rdp") else "pld"\n    if not 0',
             CLT),
    Mutation("any difference passes", "accountants", "if not (pld == prv or abs(pld - prv) <=",
             "if False and not (abs(pld - prv) <=", STOP),
    Mutation("a difference of 5 % passes", "accountants", "= 0.01, 0.01", "= 0.01, 0.05", STOP),
    Mutation("only prv may be too low", "accountants", "abs(pld - prv) <=", "pld - prv <=", STOP),
    Mutation("only prv may be too high", "accountants", "abs(pld - prv) <=", "prv - pld <=", STOP),
    Mutation("a new accountant every round", "accountants", "+= event.steps", "= event.steps", COMPOSE),
    Mutation("events merged whatever their noise", "accountants", "steps[replace(event, steps=1)]",
             "steps[replace(event, steps=1, noise_multiplier=1.1)]", MIXED),
    Mutation("events merged whatever their rate", "accountants", "steps[replace(event, steps=1)]",
             "steps[replace(event, steps=1, sample_rate=0.02)]", MIXED),
    Mutation("no noise is free", "accountants", "        return math.inf\n    cut",
             "        return 0.0\n    cut", "events_that_cost_infinity_are_not_forgotten"),
    Mutation("cut draws are free", "accountants",
             "value if (1 + math.exp(min(value, 700.0))) * cut <= reserved", "value if True", CUT),
    Mutation("cut draws weigh the same at any epsilon", "accountants",
             "(1 + math.exp(min(value, 700.0))) * cut", "2 * cut", CUT),
    Mutation("delta is not shared with cut draws", "accountants", "delta - reserved, accountant",
             "delta, accountant", CUT),
    Mutation("cut draws of one step only", "accountants", "event.steps * _cut_probability(event)",
             "_cut_probability(event) ** 2", CUT),
    Mutation("delta unchecked", "accountants", "    if not 0 < delta < 1:\n        raise PrivacyError(",
             "    if False:\n        raise PrivacyError(", DELTA),
    Mutation("delta of one record passes", "calibration", "not 0 < delta < 1 / records",
             "not 0 < delta <= 1 / records", DELTA),
    Mutation("delta of any size passes", "calibration", "if records < 1 or not 0 < delta < 1 / records:",
             "if False:", DELTA),
    Mutation("calibrated noise is not confirmed", "calibration",
             "if epsilon(events(sigma), target_delta, accountant) <= target_epsilon:",
             "if sigma := 0.99 * sigma:", BUDGET),
    Mutation("calibrated noise is not agreed upon", "calibration",
             "            agreed_epsilon(events(sigma), target_delta, accountant)\n", "", STOP),
    Mutation("what is released beside is not paid", "calibration",
             "return [spent(mechanism, sampling, steps), *beside]",
             "return [spent(mechanism, sampling, steps)]", BUDGET),
    Mutation("calibrated for one step less", "calibration", "spent(mechanism, sampling, steps)",
             "spent(mechanism, sampling, steps - 1)", BUDGET),
    Mutation("calibrated without the cap", "calibration", "spent(mechanism, sampling, steps)",
             "DpEvent(noise_multiplier=sigma, sample_rate=sampling.rate, steps=steps)",
             "a_ruinous_cap_is_not_calibrated"),
)  # fmt: skip


def _run(name, loaded):
    check = {check.__name__: check for check in account_checks.CHECKS}[name]
    check(loaded["accountants"], loaded["calibration"])


@pytest.mark.parametrize("check", account_checks.CHECKS, ids=lambda check: check.__name__)
def test_the_real_accounts_pass(check):
    _run(check.__name__, mutated(ACCOUNTS))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutants_of_the_accounts_are_caught(mutation):
    from fedlora.errors import PrivacyError

    loaded = mutated(ACCOUNTS, mutation.module, mutation.old, mutation.new)
    # Where two accountants check each other, or the library what it is given, the refusal itself is the catch.
    refusals = {AGREE: PrivacyError, LOSSES: ValueError}
    with pytest.raises((AssertionError, refusals.get(mutation.caught_by, AssertionError))):
        _run(mutation.caught_by, loaded)


def test_every_check_of_the_accounts_catches_a_mutant():
    assert {mutation.caught_by for mutation in MUTATIONS} == {
        check.__name__ for check in account_checks.CHECKS
    }
