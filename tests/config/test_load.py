"""Errors a person can act on: file, line, key, what is wrong, what to write. Configs survive a round trip."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config.load import _computed, config_digest, dump_config, json_schema, load_config, load_node
from fedlora.config.schema import RunConfig
from fedlora.config.template import NODE_YAML, RUN_YAML
from fedlora.config.yaml_text import parse, render
from fedlora.errors import ConfigError


def written(directory: Path, text: str) -> Path:
    path = directory / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def line_of(text: str) -> int:
    """The line of the template that begins with `text`."""
    return next(i for i, line in enumerate(RUN_YAML.splitlines(), start=1) if line.strip().startswith(text))


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_status == 2
    return str(caught.value)


MISTAKES = [
    # (line in the template, what to write instead, line of the error, key, what the message must say)
    (
        "  rounds: 20",
        "  rounds: 0",
        "  rounds",
        "federation.rounds",
        "0 does not fit; write a whole number >= 1",
    ),
    ("  rounds: 20", "  rounds: 1.5", "  rounds", "federation.rounds", "write a whole number >= 1"),
    ("  rounds: 20", "  rounds: true", "  rounds", "federation.rounds", "true does not fit"),
    ("  rounds: 20", "  roundz: 10", "  rounds", "federation.roundz", "unknown key; write rounds"),
    ("  rounds: 20", "  rounds: ten", "  rounds", "federation.rounds", "'ten' does not fit"),
    (
        "  max_grad_norm: 2.0",
        "  max_grad_norm: .inf",
        "  max_grad_norm",
        "privacy.max_grad_norm",
        "inf does not fit",
    ),
    ("  target_delta: 1.0e-5", "  target_delta: 1", "  target_delta", "privacy.target_delta", "> 0 and < 1"),
    ("  accountant: pld", "  accountant: gdp", "  accountant", "privacy.accountant", "pld, prv, rdp"),
    (
        "  name: fedsvd",
        "  name: fedsdv",
        "  name: fedsvd",
        "method.name",
        "write fedsvd (allowed: fedsvd, ffa, fedsb, svfit, fedavg, ",
    ),
    (
        "  name: fedsvd",
        "  name: ffa",
        "  refactor_every",
        "method.refactor_every",
        "write name: fedsvd, which has it",
    ),
    ("  kind: ray", "", "runtime", "runtime.kind", "missing; write one of local, ray, flower"),
    (
        "  optimizer: {name: sgd",
        "  optimizer: {lr: 1}",
        "  optimizer",
        "federation.optimizer.name",
        "missing",
    ),
    (
        "  optimizer: {name: sgd",
        "  optimizer: sgd",
        "  optimizer",
        "federation.optimizer",
        "name: one of",
    ),
    (
        "  target_modules: [query, value]",
        "  target_modules: query",
        "  target_modules",
        "lora.target_modules",
        "a list",
    ),
    ("  cohort: 8", "  cohort: {chance: 0.5}", "  cohort", "federation.cohort.probability", "missing"),
    (
        "  cohort: 8",
        "  cohort: 9",
        "  cohort",
        "federation.cohort",
        "data.partition.clients is 8; write 8 or less",
    ),
    (
        "  kind: ray",
        "  kind: local\n  address: x",
        "  workers",
        "runtime.address",
        "write null, or kind: ray",
    ),
    ("output: runs/first", "output: 7", "output", "output", 'put it in quotes: "7"'),
]


@pytest.mark.parametrize(("good", "bad", "at", "key", "says"), MISTAKES)
def test_a_mistake_is_told_with_its_line_its_key_and_the_mend(tmp_path, good, bad, at, key, says):
    lines = RUN_YAML.splitlines()
    number = next(i for i, line in enumerate(lines) if line.startswith(good))
    path = written(tmp_path, "\n".join([*lines[:number], bad, *lines[number + 1 :]]))
    told = message(path)
    wanted = [line for line in told.splitlines() if line.startswith(f"{path}:{line_of(at.strip())}: {key}: ")]
    assert wanted, told
    assert says in wanted[0]
    assert "; " in wanted[0] and "pydantic" not in told and "Traceback" not in told


def test_every_mistake_is_told_at_once_in_the_order_of_the_file(tmp_path):
    text = (
        RUN_YAML.replace("seed: 1\n", "seed: -1\n")
        .replace("rounds: 20", "rounds: 0")
        .replace("name: sgd", "name: sdg")
    )
    told = message(written(tmp_path, text), "privacy.target_epsilon=0").splitlines()
    assert [line.split(": ")[1] for line in told[:-1]] == [
        "seed",
        "federation.rounds",
        "federation.optimizer.name",
    ]
    assert told[-1].startswith("--set privacy.target_epsilon=0: privacy.target_epsilon: 0 does not fit")


def test_a_missing_key_is_told_at_the_line_of_its_section(tmp_path):
    text = "\n".join(line for line in RUN_YAML.splitlines() if "target_delta" not in line)
    at = next(i for i, line in enumerate(text.splitlines(), start=1) if line.startswith("privacy:"))
    told = message(written(tmp_path, text))
    assert told == f"{tmp_path}/run.yaml:{at}: privacy.target_delta: missing; write a number > 0 and < 1"


@pytest.mark.parametrize("value", ["null", "yes", "3", "[]", "{}"])
def test_privacy_is_a_budget_or_the_word_none(tmp_path, value):
    path = written(tmp_path, RUN_YAML)
    assert load_config(path, ["privacy=none"]).privacy == "none"
    told = message(path, f"privacy={value}")
    assert "target_epsilon" in told and told.startswith(f"--set privacy={value}: privacy")


@pytest.mark.parametrize("value", ["undeclared", "nothing", "public-data", "{private_runs: 2}"])
def test_what_was_tuned_on_is_declared_in_one_of_four_ways_and_survives_a_dump(tmp_path, value):
    """I-40. Undeclared is the default: nobody is made to claim more than they know. It decides nothing in a run."""
    path = written(tmp_path, RUN_YAML.replace("  tuned_on: undeclared", "  # tuned_on"))
    assert load_config(path).privacy.tuned_on == "undeclared"
    declared = load_config(path, [f"privacy.tuned_on={value}"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(declared))
    assert load_config(again) == declared
    assert config_digest(declared) == config_digest(load_config(path))


@pytest.mark.parametrize(
    ("value", "key", "says"),
    [
        ("{private_runs: 1}", "privacy.tuned_on.private_runs", "write a whole number >= 2"),
        ("{runs: 3}", "privacy.tuned_on.runs", "unknown key"),
        ("public", "privacy.tuned_on", "undeclared, nothing, public-data, or a mapping with private_runs"),
        ("10", "privacy.tuned_on", "does not fit"),
    ],
)
def test_another_declaration_of_tuning_is_an_error(tmp_path, value, key, says):
    told = message(written(tmp_path, RUN_YAML), f"privacy.tuned_on={value}")
    assert f": {key}: " in told and says in told


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("seed: 1\nmodel: {name: a}\nseed: 2\n", 3, "already written in line 1"),
        ("seed: 1\nmodel:\n  name: a\n  name: b\n", 4, "model.name: already written in line 3"),
        ("seed: [1\n", 2, "not readable as YAML"),
        ("seed: 1\n\tmodel: 2\n", 2, "not readable as YAML"),
        ("seed: 1\nmodel: !!python/object/apply:os.system [true]\n", 2, "os.system is not read here"),
        ("seed: !!binary aGk=\n", 1, "binary is not read here"),
        ("a: &x [1]\nb: *x\n", 2, "alias *x is not read here"),
        ("seed: 1\n? [a, b]\n: 2\n", 2, "a key must be a word"),
        ("seed: 1\n---\nseed: 2\n", 2, "not readable as YAML"),
        ("seed: 1\nname: \x07\n", 2, "U+0007"),
        ("[" * 3000, 1, "nested too deeply"),
        ("seed: " + "9" * 5000, 1, "cannot be read as a number"),
        ("- a\n- b\n", 1, "is not a config"),
        ("just words\n", 1, "is not a config"),
    ],
)
def test_text_that_is_no_config_is_told_with_its_line(tmp_path, text, line, says):
    told = message(written(tmp_path, text))
    assert told.startswith(f"{tmp_path}/run.yaml:{line}: ") and says in told
    assert "just words" not in told  # whose they may be nobody knows


def test_files_that_cannot_be_read_are_told(tmp_path):
    assert "no such file" in message(tmp_path / "none.yaml")
    assert "cannot be read" in message(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("seed: é".encode("latin-1"))
    assert "not UTF-8" in message(tmp_path / "latin.yaml")
    assert "model: missing" in message(written(tmp_path, ""))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("privacy.target_epsilon", "not `key=value`"),
        ("=3", "not `key=value`"),
        ("privacy.engin=opacus", "unknown key; write engine"),
        (
            "privcy.target_epsilon=1",
            "privcy: unknown key; did you mean privacy? that is set already: change that one instead",
        ),
        ("federation.rouns=3", "federation.rouns: unknown key; did you mean rounds? that is set already"),
        ("rounds=3", "rounds: unknown key; write federation.rounds"),
        ("lora.rank=3", "lora.rank: unknown key; did you mean r? that is set already"),
        ("federation.optimizer.learning_rate=3", "optimizer.learning_rate: unknown key; did you mean lr?"),
        ("federation.lr=3", "unknown key; write federation.optimizer.lr or federation.server.lr"),
        ("name=x", "name: unknown key; remove it; keys here are seed, model"),
        ("privacy.target_epsilon=[", "not readable as YAML"),
        ("seed.deep=3", "seed is 1, not a section"),
        ("lora.r=eight", "lora.r: 'eight' does not fit"),
    ],
)
def test_a_wrong_override_is_told_by_its_own_text(tmp_path, override, says):
    path = written(tmp_path, RUN_YAML)
    if override == "privacy.target_epsilom=3":
        path = written(tmp_path, RUN_YAML.replace("  target_epsilon: 8.0", ""))
    told = message(path, override)
    assert (
        f"--set {override}: " in told.replace(f"--set {override}:1: ", f"--set {override}: ") and says in told
    )


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.partition.clients=2", "federation.cohort: 8 clients asked, but data.partition.clients is 2"),
        ("method.name=fedavg", "method.refactor_every: unknown key"),
        ("method={name: fedavg}", "lora.init: centred, but fedavg keeps"),
        ("data.source=files", "data.max_per_class: unknown key"),
        ("data.source=files", "data.train: missing"),
    ],
)
def test_what_an_override_does_to_another_key_is_its_fault(tmp_path, override, says):
    assert f"--set {override}: {says}" in message(written(tmp_path, RUN_YAML), override)


def test_each_override_is_blamed_for_its_own_and_none_for_the_files(tmp_path):
    path = written(tmp_path, RUN_YAML.replace("evaluate_every: 5", "min_clients: 9"))
    overrides = ("data.partition.clients=2", "seed=3", "method={name: fedavg}")
    told = message(path, *overrides).splitlines()
    origins = [f"{path}:{line_of('evaluate_every: 5')}", f"--set {overrides[0]}", f"--set {overrides[2]}"]
    for line, origin in zip(told, origins, strict=True):
        assert line.startswith(f"{origin}: ")


def test_an_override_that_another_builds_on_is_not_blamed_for_more_than_it_did(tmp_path):
    path = written(tmp_path, RUN_YAML.replace("evaluate_every: 5", "min_clients: 9"))
    told = message(path, "world={}", "world=null", "lora.r=4", "privacy={}", "privacy=none")
    assert told.startswith(f"{path}:{line_of('evaluate_every: 5')}: federation.min_clients: 9 answers needed")


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path):
    path = written(tmp_path, RUN_YAML)
    config = load_config(
        path,
        [
            *("privacy.target_epsilon=3", "privacy.target_delta=1e-6", "lora.target_modules=[key]", "seed=4"),
            *("seed=5", "data.partition={kind: iid, clients: 20}", "federation.cohort={probability: 0.25}"),
        ],
    )
    assert (config.privacy.target_epsilon, config.privacy.target_delta) == (3.0, 1e-6)
    assert (config.lora.target_modules, config.seed) == (["key"], 5)
    assert (config.data.partition.clients, config.federation.cohort.probability) == (20, 0.25)


def test_the_written_templates_load(tmp_path):
    assert isinstance(load_config(written(tmp_path, RUN_YAML)), RunConfig)
    assert load_node(written(tmp_path, NODE_YAML)).budget.target_epsilon == 8.0


def test_a_dumped_config_loads_back_to_an_equal_one(tmp_path):
    for overrides in (
        [],
        ["privacy=none", "data.max_test_examples=null"],
        [
            "model.name='1e5'",
            "output='no'",
            "privacy.target_delta=1e-9",
            "federation.cohort={probability: {a: 0.5}}",
        ],
    ):
        config = load_config(written(tmp_path, RUN_YAML), overrides)
        again = tmp_path / "again.yaml"
        again.write_text(dump_config(config), encoding="utf-8")
        assert load_config(again) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.kernels=triton"], "model.kernels: triton, but runtime.device is cpu"),
        (
            ["model.kernels=onednn", "model.dtype=bfloat16"],
            "onednn packs float32 weights on cores, not bfloat16 on cpu",
        ),
        (
            ["model.kernels=onednn", "runtime={kind: ray, device: cuda}"],
            "not float32 on cuda; write kernels: auto",
        ),
        (
            ["model.gradient_checkpointing=true", "runtime={kind: local, cache_prefix: true}"],
            "cannot be combined with runtime.cache_prefix",
        ),
        (
            ["model.gradient_checkpointing=true", "privacy.engine=opacus"],
            "privacy.engine: opacus counts a layer that runs again as used twice, but model.gradient_checkpointing is "
            "true; write engine: direct, or gradient_checkpointing: false",
        ),
        (
            ["model.quantization=nf4", "model.dtype=float64"],
            "model.dtype: float64, but nf4 keeps no such digits; write float32 or bfloat16",
        ),
        (
            ["model.quantization=int4"],
            "model.quantization: 'int4'",
        ),
    ],
)
def test_kernels_that_cannot_be_are_named(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config(written(tmp_path, RUN_YAML), changes)


def test_the_digest_names_what_is_computed_and_nothing_else(tmp_path):
    path = written(tmp_path, RUN_YAML)
    own = config_digest(load_config(path))
    assert config_digest(load_config(path, ["output=elsewhere", "runtime={kind: ray, workers: 7}"])) == own
    assert (
        config_digest(load_config(path, ["model.kernels=torch", "model.gradient_checkpointing=true"])) == own
    )
    others = [
        config_digest(load_config(path, [change]))
        for change in (
            "seed=2",
            "privacy.target_epsilon=7",
            "method.stale.beta=0.1",
            "privacy=none",
            "lora.r=5",
        )
    ]
    assert len({own, *others}) == 6


def test_the_json_schema_is_closed_and_explains(tmp_path):
    schema = json_schema()
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) >= {"seed", "privacy", "runtime"}
    assert "zero-out" in schema["$defs"]["Privacy"]["properties"]["target_epsilon"]["description"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("0x1F", 31),
        ("0o17", 15),
        ("007", 7),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'1e-5'", "1e-5"),
        ("1e", "1e"),
        ("-", [None]),
        (".", "."),
    ],
)
def test_plain_scalars_are_read_as_yaml_1_2_says(text, value):
    got = parse(f"x: {text}" if text != "-" else "x:\n -", "here").value["x"]
    assert got == value and type(got) is type(value)


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(
        st.characters(blacklist_categories=["Cs", "Cc", "Cn"], blacklist_characters="\u2028\u2029\ufeff"),
        max_size=12,
    )
)


@given(
    st.dictionaries(
        st.text("abcdefgh123-_", min_size=1, max_size=8), st.recursive(PLAIN, st.lists, max_leaves=5)
    )
)
def test_what_is_rendered_is_read_back(value):
    assert parse(render(value), "here").value == value


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["federation.enough=4"], "which waits for all; write null"),
        (["federation.enough=9", "runtime={kind: flower}"], "write 8 or less, or null"),
        (["federation.enough=1", "federation.min_clients=2", "runtime={kind: flower}"], "write 2 or more"),
    ],
)
def test_a_round_cannot_end_with_more_answers_than_are_asked_for_or_fewer_than_are_needed(
    tmp_path, given, says
):
    with pytest.raises(ConfigError, match=rf"federation\.enough: .*{says}"):
        load_config(written(tmp_path, RUN_YAML), given)


def test_clients_have_betas_of_their_own_only_where_each_counts_by_itself(tmp_path):
    path, own = written(tmp_path, RUN_YAML), "method.stale.beta=adaptive-by-client"
    importance, coins = "federation.participation=importance", "federation.cohort={probability: 0.5}"
    for changes in ([own], [own, importance], [own, coins]):
        with pytest.raises(ConfigError, match=r"method\.stale\.beta: .*; write adaptive, or participation"):
            load_config(path, changes)
    assert load_config(path, [own, importance, coins]).method.stale.beta == "adaptive-by-client"


def test_no_step_goes_further_back_than_it_came(tmp_path):
    path = written(tmp_path, RUN_YAML)
    steep = ["federation.optimizer={name: sgd, lr: 16.0, proximal: 0.1}"]
    with pytest.raises(
        ConfigError, match=r"federation\.optimizer\.proximal: .*1\.6 times.*; write 0\.0625 or less"
    ):
        load_config(path, steep)
    assert load_config(path, ["federation.optimizer.proximal=0.0625"]).federation.optimizer.proximal == 0.0625


def test_no_more_steps_than_can_be_accounted_for_are_taken(tmp_path):
    path = written(tmp_path, RUN_YAML)
    most = ["federation.local_steps=100000", "privacy.max_participations=10"]
    assert load_config(path, most).federation.local_steps == 100_000
    with pytest.raises(
        ConfigError, match=r"federation\.local_steps: 100000 steps in each of 11 participations"
    ):
        load_config(path, [*most, "privacy.max_participations=11"])
    assert load_config(path, [*most, "privacy=none"]).federation.local_steps == 100_000

    node = written(tmp_path, NODE_YAML)
    most = ["work.local_steps=100000", "budget.max_participations=10"]
    assert load_node(node, most).work.local_steps == 100_000
    with pytest.raises(
        ConfigError, match=r"work\.local_steps: 100000 steps .*; lower it, or budget\.max_part"
    ):
        load_node(node, [*most, "budget.max_participations=11"])


def test_rows_of_b_have_steps_of_their_own_only_where_b_is_trained(tmp_path):
    rows = ["federation.optimizer.precondition=allora", "method={name: fedsb}", "lora.trains=core"]
    with pytest.raises(ConfigError, match=r"federation\.optimizer\.precondition: .* write none or lora-pro"):
        load_config(written(tmp_path, RUN_YAML), rows)
    own = ["work.optimizer.precondition=allora", "lora.trains=core"]
    with pytest.raises(ConfigError, match=r"work\.optimizer\.precondition: .* write none or lora-pro"):
        load_node(written(tmp_path, NODE_YAML), own)
    assert load_config(written(tmp_path, RUN_YAML), rows[:1]).federation.optimizer.precondition == "allora"


def test_mifa_counts_what_is_remembered_whole(tmp_path):
    path = written(tmp_path, RUN_YAML)
    for beta in ("0.5", "adaptive"):
        with pytest.raises(
            ConfigError, match=r"method\.stale\.beta: .*, but mifa .*; write 1\.0, or rule: fedstale"
        ):
            load_config(path, [f"method.stale={{rule: mifa, beta: {beta}}}"])
    assert load_config(path, ["method.stale={rule: mifa, beta: 1}"]).method.stale.rule == "mifa"


@pytest.mark.parametrize(
    "already", ["method.stale={rule: mifa, beta: 1.0}", "federation.optimizer.decay=none"]
)
def test_where_rates_are_decided_the_key_that_decides_them_is_in_no_name(tmp_path, already):
    path = written(tmp_path, RUN_YAML)
    names = {
        config_digest(load_config(path, [already, f"method.stale.scale_by_rate={value}"]))
        for value in ("true", "false")
    }
    assert len(names) == 1


def test_a_key_that_came_later_leaves_the_name_of_a_run_that_does_not_use_it(tmp_path):
    """The name is in every noise key: another one is another run."""
    path = written(tmp_path, RUN_YAML)
    few = ["federation.enough=2", "runtime={kind: flower}"]
    assert "enough: null" in dump_config(load_config(path))
    assert config_digest(load_config(path, few)) != config_digest(load_config(path))
    assert '"enough"' not in json.dumps(_computed(load_config(path)))
    assert config_digest(load_config(path, ["model.quantization=int8"])) != config_digest(load_config(path))
    assert "quantization: none" in dump_config(load_config(path))
    assert '"quantization"' not in json.dumps(_computed(load_config(path)))


@pytest.mark.parametrize(
    ("key", "alone", "used"),
    [
        ("smoothing", "method.stale.smoothing=0.5", ["method.stale.beta=adaptive"]),
        ("smoothing", "method.stale.smoothing=0.9", ["method.stale.beta=adaptive", "method.stale.smoothing=0.5"]),
        ("server", "federation.server={name: sgd, lr: 1.0}", ["federation.server={name: sgd, lr: 0.5}"]),
        ("proximal", "federation.optimizer.proximal=0", ["federation.optimizer.proximal=0.01"]),
        ("precondition", "federation.optimizer.precondition=none", ["federation.optimizer.precondition=allora"]),
        ("scale_by_rate", "method.stale.scale_by_rate=false", ["method.stale.scale_by_rate=true"]),
        ("rule", "method.stale.rule=fedstale", ["method.stale={rule: mifa, beta: 1.0}"]),
        ("server", "federation.server.name=sgd", ["federation.server={name: adam, lr: 1.0}"]),
    ],
)  # fmt: skip
def test_a_key_without_effect_leaves_the_name_of_the_run(tmp_path, key, alone, used):
    path = written(tmp_path, RUN_YAML)
    own = config_digest(load_config(path))
    assert f"{key}:" in dump_config(load_config(path))
    assert f'"{key}"' not in json.dumps(_computed(load_config(path)))
    assert config_digest(load_config(path, [alone])) == own
    assert f'"{key}"' in json.dumps(_computed(load_config(path, used)))
    assert config_digest(load_config(path, used)) != own


def test_a_node_refuses_digits_that_its_base_would_not_keep(tmp_path):
    changes = ["model.quantization=int8", "model.dtype=float64"]
    with pytest.raises(ConfigError, match=r"model\.dtype: float64, but int8 keeps no such digits"):
        load_node(written(tmp_path, NODE_YAML), changes)
    assert load_node(written(tmp_path, NODE_YAML), changes[:1]).model.quantization == "int8"
