"""`fedlora audit`: what it prints, and the status it ends with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.audit.audit import Verdict, audit, claim_of
from fedlora.audit.mutations import broken
from fedlora.audit.trace import Implementation
from fedlora.cli import audit as command
from fedlora.cli.output import Format
from fedlora.errors import ConfigError, FedLoraError, PrivacyError

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def told(capsys, **options):
    command.audit(CONFIG, **options)
    return capsys.readouterr().out


def test_a_quick_audit_tells_bound_claim_tiers_and_verdict(capsys):
    found = json.loads(told(capsys, quick=True, form=Format.JSON))
    assert found["claimed"] == 8.0 and found["delta"] == 1e-5
    assert 0 < found["lower_bound"] < 8.0
    assert set(found["tiers"]) == {"step", "one_run", "sampler"}
    assert found["power"] == {} and found["verdict"] == "no violation found"
    assert found["seed"] == 1 and found["audited_at"]["max_grad_norm"] == 2.0


def test_the_same_seed_tells_the_same_and_an_override_counts(capsys):
    def quick(**options):
        return json.loads(told(capsys, quick=True, form=Format.JSON, **options))

    three = ["privacy.target_epsilon=3.0"]
    first, again, other = (quick(seed=s, overrides=three) for s in (5, 5, 6))
    assert first == again != other and first["claimed"] == 3.0


def test_the_text_says_that_a_pass_is_no_proof_and_a_bound_is_not_the_epsilon(capsys):
    text = told(capsys, quick=True)
    assert "epsilon is at least" in text and "power not measured" in text
    assert "does not prove privacy" in text and "never the epsilon" in text
    assert "reference size, with the config's own budget" in text


def test_a_config_without_privacy_has_no_claim_to_audit():
    with pytest.raises(ConfigError, match=r"privacy: none claims nothing.*--set"):
        command.audit(CONFIG, overrides=["privacy=none"])


@pytest.mark.parametrize("claimed", [0.1, 100.0])
def test_a_claim_that_the_audit_is_too_blunt_for_is_refused_with_the_next_move(claimed):
    with pytest.raises(ConfigError, match=r"outside 0.5 to 50.*--set privacy\.target_epsilon=1"):
        command.audit(CONFIG, overrides=[f"privacy.target_epsilon={claimed}"])


def test_a_refuted_claim_ends_with_status_3():
    halved = next(mutant for mutant in broken(Implementation()) if mutant.name == "noise halved")
    result = audit(claim_of(3.0, 1e-5, 1.0), 1, halved, power=False)
    assert result.verdict is Verdict.REFUTED
    with pytest.raises(PrivacyError, match=r"epsilon 3 is refuted \(step; .*at least 1") as raised:
        command.require_passed(result)
    assert raised.value.exit_status == 3


def test_far_too_much_noise_fails_as_an_audit_that_shows_nothing():
    def deafening(mechanism):
        return replace(mechanism, noise_multiplier=3 * mechanism.noise_multiplier)

    result = audit(claim_of(3.0, 1e-5, 1.0), 1, Implementation(mechanism=deafening), power=False)
    assert result.verdict is Verdict.TOO_WEAK
    with pytest.raises(FedLoraError, match="broken or the noise is far too large") as raised:
        command.require_passed(result)
    assert raised.value.exit_status == 1


def test_the_power_table_has_a_line_for_each_broken_implementation():
    """From one result put together by hand of two audits, since the gate's tests measure all of them."""
    claim = claim_of(3.0, 1e-5, 1.0)
    shipped = audit(claim, 1, power=False)
    clip_off = next(mutant for mutant in broken(Implementation()) if mutant.name == "clip off")
    result = replace(shipped, power={"clip off": audit(claim, 1, clip_off, power=False).tiers})
    text = command.audit_text(CONFIG, result)
    assert "1 of 1 broken implementations are refuted" in text and "step (joint), one-run" in text
    entry = command.audit_json(result)["power"]["clip off"]
    assert entry["refuted_by"] == ["step", "one-run"] and entry["lower_bound"] > 100
