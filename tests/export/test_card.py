"""The model card says what was promised, what was not, and how to load what lies beside it."""

import yaml

from fedlora.export.card import data_source, model_card


def test_the_card_states_the_promise_and_its_limits(tiny_config, summary):
    card = model_card(tiny_config(model__name="org/model"), summary)
    for said in (
        "epsilon 3.201 at delta 1e-05 (SIMULATION: not a guarantee)",
        "one record of one client",
        "zero-out",
        "pld",
        "25.0 % before, 75.0 % after",
        "FedSVD",
        "Not protected",
        "| `client-1` | 1 | 2 | 1.5 | 2.25 |",
    ):
        assert said in card, said


def test_the_front_matter_is_yaml_that_hubs_read(tiny_config, summary):
    matter = yaml.safe_load(model_card(tiny_config(model__name="org/model"), summary).split("---")[1])
    assert matter["library_name"] == "peft" and matter["base_model"] == "org/model"
    assert "differential-privacy" in matter["tags"]
    merged = yaml.safe_load(model_card(tiny_config(), summary, merged=True).split("---")[1])
    assert merged["library_name"] == "transformers" and "base_model" not in merged  # a path of this machine


def test_a_run_without_privacy_is_not_called_private(tiny_config, not_private):
    card = model_card(tiny_config(privacy="none"), not_private)
    assert (
        "NOT PRIVATE" in card
        and "differential-privacy" not in card
        and "one record of one client" not in card
    )


def test_a_name_cannot_become_markup(tiny_config, summary):
    hostile = "a`</code>|\n# b"
    card = model_card(
        tiny_config(), {**summary, "epsilon_by_client": {hostile: 1.0}, "epsilon_replace_one_by_client": None}
    )
    assert "| `a'</code>/ # b` | 0 | 0 | 1 | - |" in card


def test_no_path_of_this_machine_is_told(tiny_config):
    assert data_source(tiny_config()) == "local file `train.tsv`"
