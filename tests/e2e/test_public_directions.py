"""A run whose first subspace public labelled records chose: read by the server alone, named where it is missing."""

import json

import pytest
import torch

from fedlora.errors import ConfigError, DataError
from fedlora.export.statement import privacy_statement
from fedlora.methods import build
from fedlora.runs.beginning import first_state
from fedlora.runtime.check.outline import outline
from fedlora.runtime.prepare import prepare
from fedlora.runtime.simulate import resume, simulate
from fedlora.training.gradients import gradient_directions


@pytest.fixture
def public(tmp_path, topic_files):
    """Forty public sentences, with the columns of the private ones."""
    path = tmp_path / "public.tsv"
    path.write_text("\n".join(topic_files[1].read_text().splitlines()[:41]) + "\n")
    return path


def unheard(event):
    pass


def test_the_first_a_is_made_of_the_public_file_and_of_no_private_record(
    tiny_config, public, topic_files, tmp_path
):
    config = tiny_config(lora__init="gradients", data__public=str(public))
    prepared = prepare(config, unheard)
    state = prepared.first_state()
    read = prepared.clients.test.select(range(40))  # the first forty of the test file are the public ones
    for site, (_, rows) in gradient_directions(prepared.model, read, 2).items():
        assert torch.equal(state.adapters.sites[site].a, rows.to(torch.float32))
    other = tmp_path / "other.tsv"
    lines = topic_files[0].read_text().splitlines()
    other.write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    moved = config.model_copy(update={"data": config.data.model_copy(update={"train": str(other)})})
    again = first_state(moved, prepared.model, build(moved.method, moved.lora, moved.seed))
    assert all(torch.equal(again.adapters.sites[s].a, f.a) for s, f in state.adapters.sites.items())


@pytest.mark.parametrize(
    "method",
    [{"lora__init": "gradients"}, {"method": {"name": "fedsb", "left": "gradients"}, "lora__trains": "core"}],
)
def test_such_a_run_stays_within_its_budget_and_is_resumed_without_the_file(
    tiny_config, public, tmp_path, method
):
    config = tiny_config(data__public=str(public), **method)
    run_dir = simulate(config, tmp_path / "run", unheard)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["epsilon_max"] <= 8 and str(public) in privacy_statement(summary).not_protected[-1]
    (run_dir / "summary.json").unlink()
    public.unlink()
    resume(run_dir, unheard)
    assert json.loads((run_dir / "summary.json").read_text())["state_sha256"] == summary["state_sha256"]


def test_a_file_that_is_missing_unread_or_of_other_labels_is_named(tiny_config, public):
    with pytest.raises(ConfigError, match=r"data\.public: missing, but lora\.init is gradients"):
        tiny_config(lora__init="gradients")
    with pytest.raises(ConfigError, match=r"method\.left is gradients"):
        tiny_config(method={"name": "fedsb", "left": "gradients"}, lora__trains="core")
    with pytest.raises(ConfigError, match=r"data\.public: .*alone would read"):
        tiny_config(data__public=str(public))
    mistaken = {f"{public}x": "no such file", str(public.parent): "a directory; name the file in it"}
    for wrong, says in mistaken.items():
        with pytest.raises(DataError, match=says):
            outline(tiny_config(lora__init="gradients", data__public=wrong))
    private = tiny_config().data.train
    with pytest.raises(ConfigError, match=r"data\.public: .* is data\.train itself"):
        tiny_config(lora__init="gradients", data__public=private)
    with pytest.raises(DataError, match="no such file"):
        prepare(tiny_config(lora__init="gradients", data__public=str(public) + "x"), unheard).first_state()
    public.write_text(public.read_text() + "cooking\tit rains\teast\n")
    with pytest.raises(DataError, match="1 labels are not among classes"):
        prepare(tiny_config(lora__init="gradients", data__public=str(public)), unheard).first_state()
