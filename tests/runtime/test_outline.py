"""What `check` tells from sizes and shapes: near what is measured, refused where that would be, and without torch."""

import json
import subprocess
import sys

import pytest

from fedlora.config.load import dump_config
from fedlora.errors import ConfigError, DataError, ModelError, PrivacyError
from fedlora.federation.events import Event, Note, RunStarted
from fedlora.runtime.check.answer import Preview
from fedlora.runtime.check.measured import preview
from fedlora.runtime.check.outline import outline, run_seconds
from fedlora.runtime.scoring import prepared_for_scoring
from fedlora.runtime.simulate import simulate
from tests.data.unfriendly import unfriendly_hub


def silent(event):
    """Nobody listens."""


HEAVY = ("torch", "transformers", "peft", "opacus", "ray", "flwr", "scipy", "dp_accounting")
DEALT = {"kind": "quantity", "clients": 3, "alpha": 2.0, "min_examples": 40}


def test_sizes_numbers_and_bytes_are_those_of_the_loaded_model_and_noise_is_near(tiny_config):
    config = tiny_config(data__partition=DEALT)
    told, measured = outline(config), preview(config, lambda event: None)
    assert not told.measured and measured.measured
    assert told.trained_parameters == measured.trained_parameters
    assert told.bytes_up == pytest.approx(measured.bytes_up, rel=0.2)
    assert told.bytes_down == pytest.approx(measured.bytes_down, rel=0.2)
    for ours, theirs in zip(told.clients, measured.clients, strict=True):
        assert (ours.client, ours.records) == (theirs.client, theirs.records)
        assert ours.sample_rate == theirs.sample_rate
        # 1 % of the search, 2 of the coarse grid, a unit of the second digit; more between the ends. Never too little.
        assert theirs.noise_multiplier <= ours.noise_multiplier <= 1.15 * theirs.noise_multiplier
        assert ours.epsilon is not None and theirs.epsilon is not None and ours.epsilon >= theirs.epsilon


@pytest.mark.parametrize("trains", ["b", "ab"])
def test_what_is_trained_is_counted_for_chosen_layers(tiny_config, trains):
    method = {"b": "ffa", "ab": "fedit"}[trains]
    config = tiny_config(
        privacy="none", lora__trains=trains, method__name=method, lora__layers_to_transform=[1]
    )
    told, measured = outline(config), preview(config, lambda event: None)
    assert told.trained_parameters == measured.trained_parameters
    assert told.notes[0].startswith("NOT PRIVATE") and told.clients[0].noise_multiplier is None


@pytest.mark.parametrize(
    "changes", [{"accountant": "rdp"}, {"evaluation_noise": 40.0}, {"target_epsilon": 0.7}]
)
def test_the_noise_told_is_never_less_than_that_of_the_run(tiny_config, changes):
    config = tiny_config(
        data__partition=DEALT, **{f"privacy__{key}": value for key, value in changes.items()}
    )
    for ours, theirs in zip(
        outline(config).clients, preview(config, lambda event: None).clients, strict=True
    ):
        assert theirs.noise_multiplier <= ours.noise_multiplier <= 1.15 * theirs.noise_multiplier


def test_layers_of_a_rank_of_their_own_count_with_that(tiny_config):
    config = tiny_config(lora__rank_pattern={"value": 7}, lora__target_modules=["query", "value"])
    told, measured = outline(config), preview(config, lambda event: None)
    assert told.trained_parameters == measured.trained_parameters
    assert told.bytes_down == pytest.approx(measured.bytes_down, rel=0.1)


def test_weights_that_lie_transposed_are_counted_by_their_outputs(tiny_config, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "gpt2")
    told = outline(
        tiny_config(
            model__name=str(tmp_path / "gpt2"), task={"kind": "causal-lm"}, data__label=None,
            data__partition={"kind": "iid", "clients": 3}, lora__target_modules=["c_attn"], privacy="none",
        )
    )  # fmt: skip
    assert told.trained_parameters == 2 * 2 * 48  # two layers of rank 2, whose B has 3 x 16 rows


def test_less_budget_is_more_noise(tiny_config):
    def noise(**changes):
        return [c.noise_multiplier for c in outline(tiny_config(data__partition=DEALT, **changes)).clients]

    for less, more in zip(noise(), noise(privacy__target_epsilon=1.0), strict=True):
        assert less is not None and more is not None and more > 2 * less


def test_steps_without_end_are_told_in_time(tiny_config):
    told = outline(tiny_config(federation__local_steps=500_000, privacy__max_participations=2))
    assert all(
        client.noise_multiplier is not None and client.noise_multiplier > 20 for client in told.clients
    )


def test_what_sizes_and_shapes_already_rule_out_is_refused(tiny_config):
    with pytest.raises(ModelError, match=r"lora\.target_modules: 'nowhere' matches no linear layer"):
        outline(tiny_config(lora__target_modules=["nowhere"]))
    with pytest.raises(PrivacyError, match=r"target_delta 0\.02 is not below 1 / \d+"):
        outline(tiny_config(privacy__target_delta=0.02))


@pytest.mark.parametrize(
    "changes",
    [
        {"lora__target_modules": ["query", "word_embeddings"]},
        {"lora__target_modules": ["position_embeddings"]},
        {"lora__target_modules": ["LayerNorm"]},
        {"lora__target_modules": ["nowhere"]},
        {"lora__layers_to_transform": [1, 2]},
        {"lora__r": 33, "lora__target_modules": "all-linear"},
        {"lora__rank_pattern": {"value": 40}},
        {"model__name": "./my-model"},
        {"model__name": "/models/x"},
        {"model__name": "models/x"},
    ],
)
def test_what_the_run_refuses_of_its_model_is_refused_in_its_words(tiny_config, changes):
    config = tiny_config(**changes)
    with pytest.raises(ModelError) as told:
        outline(config)
    with pytest.raises(ModelError) as measured:
        preview(config, lambda event: None)
    assert words(told) == words(measured)


def words(caught: pytest.ExceptionInfo[ModelError]) -> str:
    """The message, less what a file calls its architecture, the head's layers, and the path within the whole model."""
    said = str(caught.value).replace("BertForSequenceClassification", "BertModel")
    return said.replace("'bert.", "'").replace("'classifier', ", "")


def test_a_text_longer_than_the_model_has_places_is_refused_by_the_check_and_by_the_run(tiny_config):
    assert outline(tiny_config(data__max_length=64)).clients
    for tell in (outline, lambda config: preview(config, lambda event: None)):
        with pytest.raises(
            ModelError, match=r"data\.max_length: 65 tokens, .* places for 64; write 64 or less"
        ):
            tell(tiny_config(data__max_length=65))


def test_no_embedding_is_offered_in_place_of_an_unknown_layer(tiny_config):
    with pytest.raises(ModelError, match=r"; it has 'dense', 'key', 'query', 'value', or write all-linear$"):
        outline(tiny_config(lora__target_modules=["nowhere"]))


def test_all_linear_is_what_it_is_of_the_loaded_model(tiny_config):
    for pooler in ("checkpoint", "identity"):
        config = tiny_config(
            lora__target_modules="all-linear", task={"kind": "sequence-classification", "pooler": pooler}
        )
        told, measured = outline(config), preview(config, lambda event: None)
        assert told.trained_parameters == measured.trained_parameters


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    with unfriendly_hub() as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield


def test_a_model_that_the_hub_may_have_is_not_spoken_of(tiny_config, hub):
    told = outline(tiny_config(model__name="nobody/has-this"))
    assert told.trained_parameters == 0 and any("not on this machine" in note for note in told.notes)


def test_a_run_on_a_gpu_is_refused_where_there_is_none(tiny_config, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(
        ConfigError, match=r"^runtime\.device: cuda, but torch finds no GPU on .*; write device: cpu"
    ):
        outline(tiny_config(runtime__device="cuda"))


def test_a_class_that_only_the_test_data_have_is_named(tiny_config, topic_files, tmp_path):
    _, test = topic_files
    (tmp_path / "test.tsv").write_text(test.read_text() + "wether\tthe old rain\tnorth\n")
    config = tiny_config(data__test=str(tmp_path / "test.tsv"), data__partition={"kind": "iid", "clients": 3})
    told = outline(config)
    assert told.classes == ("kitchen", "music", "weather", "wether")
    assert any("no training record has the label 'wether'" in note for note in told.notes)
    assert not any("no training record" in note for note in outline(tiny_config()).notes)
    measured = preview(config, lambda event: None)
    # Only --measure counts tokens.
    tokens = {note for note in measured.notes if "fill data.max_length" in note}
    assert measured.classes == told.classes and set(measured.notes) - tokens <= set(told.notes)


def test_a_batch_that_is_more_than_a_client_has_is_told(tiny_config):
    partition = {"kind": "quantity", "clients": 3, "alpha": 2.0, "min_examples": 40}
    sizes = sorted((c.records, c.client) for c in outline(tiny_config(data__partition=partition)).clients)
    (least, client), (next_least, _), _ = sizes
    config = tiny_config(data__partition=partition, federation__batch_size=next_least)
    (note,) = [note for note in outline(config).notes if "fewer records than" in note]
    assert note.startswith(
        f"1 of 3 clients has fewer records than federation.batch_size {next_least} ({client} has {least})"
    )
    assert outline(config).clients[[c.client for c in outline(config).clients].index(client)].sample_rate == 1
    enough = tiny_config(data__partition=partition, federation__batch_size=least)
    assert not any("fewer records than" in note for note in outline(enough).notes)


def test_noise_that_drowns_whatever_records_say_is_told(tiny_config):
    """By hand: three clients answer four times, in steps of a hundred of their records."""
    for epsilon, loud in ((0.05, True), (8.0, False)):
        config = tiny_config(
            federation__rounds=4, federation__batch_size=100, privacy__target_epsilon=epsilon
        )
        found = outline(config)
        noise = sum(client.noise_multiplier for client in found.clients) / 3
        assert (noise * (found.trained_parameters / (4 * 3)) ** 0.5 > 4 * 100) is loud
        assert any("long as all that its records could add up" in note for note in found.notes) is loud


def test_a_test_file_that_mostly_holds_the_texts_to_train_on_is_refused(tiny_config, topic_files, tmp_path):
    """However they are written there, and however often."""
    (head, *train), (_, *test) = (
        [line.split("\t") for line in p.read_text().splitlines()] for p in topic_files
    )
    at = head.index("sentence")
    old = list({fields[at]: fields for fields in train}.values())
    new = list(
        {fields[at]: fields for fields in test if fields[at] not in {known[at] for known in old}}.values()
    )
    path = tmp_path / "test.tsv"
    looks = (
        outline,
        lambda config: preview(config, silent),
        lambda config: prepared_for_scoring(config, silent),
    )
    for count, refused in ((len(new), False), (len(new) + 1, True)):
        copies = [[*fields[:at], f" {fields[at].upper()}  ", *fields[at + 1 :]] for fields in old[:count]]
        path.write_text("\n".join("\t".join(fields) for fields in (head, *new, *copies, *copies)))
        for look_at in looks:
            config = tiny_config(data__test=str(path))
            if refused:
                told = f"data.test: {count} of {len(new) + count} different texts are among those to train on"
                with pytest.raises(DataError, match=told):
                    look_at(config)
            elif isinstance(found := look_at(config), Preview):
                assert any(note.startswith(f"{count} of the test texts are") for note in found.notes)
    outline(tiny_config(data__test=str(path), privacy="none"))


def test_who_runs_out_of_budget_is_told_and_when_the_run_stops(tiny_config):
    def told(**changes):
        both = {"data__partition": {"kind": "iid", "clients": 4}, "federation__rounds": 9, **changes}
        return next(note for note in outline(tiny_config(**both)).notes if "may answer" in note)

    few = {"privacy__max_participations": 3}
    assert "asked about 9.0 times but may answer 3 times: after round 3 the run stops" in told(
        federation__cohort=4, **few
    )
    some = told(federation__cohort=2, **few)
    assert "asked about 4.5 times but may answer 3 times: rounds go on without it" in some
    assert "once fewer than 1 can answer, the run stops" in some


def test_a_batch_beyond_a_clients_records_takes_no_longer(tiny_config):
    def seconds(batch_size: int) -> float:
        return run_seconds(tiny_config(federation__batch_size=batch_size), 1e-3, [10, 30], 5, 1)

    assert seconds(10) < seconds(20) < seconds(30) == seconds(3000)


def test_a_run_that_may_be_served_says_whose_clients_these_are(tiny_config):
    def told(**changes):
        return "\n".join(outline(tiny_config(**changes)).notes)

    assert "fedlora serve waits for 3 nodes" in told(runtime__kind="flower")
    by_column = told(runtime__kind="flower", data__partition={"kind": "column", "column": "site"})
    assert "fedlora serve needs data.partition.clients" in by_column
    assert "simulation (fedlora simulate" not in told()


def test_help_and_check_import_no_torch_and_check_prints_a_plan(tiny_config, tmp_path):
    path = tmp_path / "given.yaml"
    path.write_text(dump_config(tiny_config()))
    for words in (["--help"], ["check", str(path)]):
        program = (
            f"import json, sys\nfrom fedlora.cli.app import main\nstatus = main({words!r})\n"
            f"print()\nprint(json.dumps([status, [name for name in {HEAVY!r} if name in sys.modules]]))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout.splitlines()[-1]) == [0, []], done.stdout + done.stderr
    assert "classes              3: 'kitchen', 'music', 'weather'" in done.stdout
    assert "noise, about" in done.stdout and "estimates from sizes and shapes" in done.stdout


def test_whoever_only_reads_a_run_or_sees_to_its_process_imports_no_torch():
    light = ("runs.rundir", "deploy.worker", "deploy.supervise", "monitor.client")
    loaded = "; ".join(f"import fedlora.{name}" for name in light)
    program = (
        f"import sys\n{loaded}\nprint([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_quick_plan_and_a_run_say_of_the_promise_what_the_exact_plan_says(tiny_config, tmp_path):
    partition = {"kind": "iid", "clients": 4}
    config = tiny_config(
        data__partition=partition,
        federation__rounds=4,
        federation__cohort=2,
        federation__reshuffle=True,
        privacy__max_participations=3,
        privacy__target_delta=1e-2,
    )
    told = outline(config).notes
    assert any("nobody can be asked more than 2 times, but the noise is for 3" in note for note in told)
    assert any("is above a tenth of 1/" in note for note in told)
    exact = preview(config, silent).notes
    assert {note for note in exact if "fill data.max_length" not in note} <= set(told)
    (cut,) = set(exact) - set(told)
    assert cut.startswith("12 of 360 texts fill data.max_length 16: what is longer is cut")
    heard: list[Event] = []
    simulate(config, tmp_path / "run", heard.append)
    started = next(place for place, event in enumerate(heard) if isinstance(event, RunStarted))
    # Its end says what the promise is worth.
    of_the_promise = ("seeded noise", "privacy.tuned_on is undeclared")
    words = [event.words for event in heard[:started] if isinstance(event, Note)]
    assert words == [note for note in exact if not note.startswith(of_the_promise)] and len(words) == 3
