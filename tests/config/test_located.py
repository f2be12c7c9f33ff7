"""What shows only while a run is prepared is told with file, line and key, like any mistake in the YAML."""

from pathlib import Path

import pytest

from fedlora.cli.app import main
from fedlora.config.load import dump_config, load_config
from fedlora.config.located import located
from fedlora.config.node import Budget as NodeBudget
from fedlora.config.schema import Privacy
from fedlora.config.template import RUN_YAML, run_yaml
from fedlora.errors import ConfigError, LedgerError, PrivacyError
from fedlora.privacy.budget import Budget

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "here.yaml"
    path.write_text(RUN_YAML)
    return path


def line_of(path: Path, key: str) -> int:
    return next(n for n, line in enumerate(path.read_text().splitlines(), 1) if line.strip().startswith(key))


@pytest.mark.parametrize(
    ("said", "key", "rest"),
    [
        ("model.name 'a/b': no files", "name:", "model.name 'a/b': no files"),
        ("data.packages: 'x' not installed", "data:", "data.packages: 'x' not installed"),
        (
            "target_delta 0.5 is not below 1 / 9; lower privacy.target_delta",
            "target_delta:",
            "privacy.target_delta: target_delta 0.5 is not below 1 / 9; lower privacy.target_delta",
        ),
        (
            "no noise; raise privacy.target_epsilon, or lower federation.batch_size",
            "target_epsilon:",
            "privacy.target_epsilon: no noise; raise privacy.target_epsilon, or lower federation.batch_size",
        ),
        ("no label; mend data.partition.kind", "partition:", "data.partition.kind: no label; mend data.par"),
        (
            "sentence-transformers/all-MiniLM-L6-v2: gone",
            "name:",
            "model.name: sentence-transformers/all-MiniLM-L6-v2: gone",
        ),
    ],
)
def test_an_error_that_speaks_of_a_key_names_its_line(config_file, said, key, rest):
    for kind in (ConfigError, PrivacyError):
        with pytest.raises(kind) as caught, located(config_file):
            raise kind(said)
        assert str(caught.value).startswith(f"{config_file}:{line_of(config_file, key)}: {rest}")


@pytest.mark.parametrize(
    "error",
    [ConfigError("runs/x holds another run of 20 rounds"), LedgerError("lr_x: privacy.target_epsilon")],
)
def test_other_errors_stay_as_they_are(config_file, error):
    said = str(error)
    with pytest.raises(type(error)) as caught, located(config_file):
        raise error
    assert str(caught.value) == said


def test_an_override_is_named_in_place_of_a_line(config_file):
    with pytest.raises(ConfigError) as caught, located(config_file, ["model.name=a/b"]):
        raise ConfigError("model.name 'a/b': no files")
    assert str(caught.value) == "--set model.name=a/b: model.name 'a/b': no files"


@pytest.mark.parametrize(
    ("override", "said", "told"),
    [
        ("data.max_length=9", "no 'x' in data.partition; lower data.max_length", "no 'x' in data.partition"),
        ("model.name=a/b", "lora.r: 8 is too much for 'a/b'; lower it", "lora.r: 8 is too much"),
        ("lora.r=9", "data.partition: nothing for a client; raise lora.r", "data.partition: nothing"),
    ],
)
def test_an_override_that_is_spoken_of_is_at_fault_rather_than_a_line(config_file, override, said, told):
    with pytest.raises(ConfigError) as caught, located(config_file, [override]):
        raise ConfigError(said)
    assert str(caught.value).startswith(f"--set {override}: ") and told in str(caught.value)


def test_an_override_is_not_at_fault_for_what_only_the_mend_quotes(config_file):
    said = "data.partition: no 'y'; it has 'a/b'"
    with pytest.raises(ConfigError) as caught, located(config_file, ["model.name=a/b"]):
        raise ConfigError(said)
    assert str(caught.value) == f"{config_file}:{line_of(config_file, 'partition')}: {said}"


def test_a_column_that_an_override_names_wrongly_is_its_fault(tiny_config, tmp_path, capsys):
    tiny_config()
    assert main(["check", str(tmp_path / "run.yaml"), "--set", "data.label=nowhere"]) == 2
    assert capsys.readouterr().err.startswith("--set data.label=nowhere: data.label: ")


@pytest.mark.parametrize(
    ("change", "status", "key"),
    [
        ("model.name=/nowhere", 2, "model.name"),
        ("lora.target_modules=[nothing]", 2, "lora.target_modules"),
        ("data.train=nowhere.tsv", 2, "data.train"),
        ("privacy.target_delta=0.5", 3, "privacy.target_delta"),
        ("privacy.target_epsilon=1e-7", 3, "privacy.target_epsilon"),
    ],
)
def test_the_commands_tell_file_line_and_key(tiny_config, tmp_path, capsys, change, status, key):
    path = tmp_path / "given.yaml"
    tiny_config()
    loaded = load_config(tmp_path / "run.yaml", [change])
    path.write_text(dump_config(loaded))
    assert main(["simulate", str(path)]) == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"{path}:{line_of(path, key.rpartition('.')[2] + ':')}: {key}"), last
    assert not (tmp_path / "run").exists()


def test_the_template_is_the_quickstart_with_comments(config_file):
    ours, theirs = load_config(config_file), load_config(PROJECT / "configs" / "quickstart.yaml")
    assert ours.model_dump(exclude={"output"}) == theirs.model_dump(exclude={"output"})


@pytest.mark.parametrize("name", ["my-run", "no", "a: b # c", "1e5"])
def test_the_templates_output_follows_its_directory(tmp_path, name):
    path = tmp_path / "run.yaml"
    path.write_text(run_yaml(name))
    assert load_config(path).output == f"runs/{name}"
    assert run_yaml("") == RUN_YAML


def test_a_budget_is_the_same_from_a_run_and_from_a_node():
    words = {"target_epsilon": 2.0, "target_delta": 1e-6, "max_participations": 3, "accountant": "prv"}
    assert Budget.of(Privacy(max_grad_norm=1.0, **words)) == Budget.of(NodeBudget(**words)) == Budget(**words)
