"""`fedlora init --data FILE`: a file and a model of somebody's own, and not one line to edit."""

import csv
import json

import pytest

from fedlora.cli.app import main
from fedlora.config.load import load_config
from fedlora.config.own_template import Own, own_yaml
from fedlora.data import load_corpus
from fedlora.data.files import load_table
from fedlora.data.look import look_through
from fedlora.errors import DataError, ModelError
from fedlora.training.look import look


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory, tiny_encoder):
    """A random two-layer Llama that reads as the tiny encoder does."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder, eos_token="[SEP]")
    tokenizer.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def reviews(tmp_path, topic_files):
    """A csv as people have it: an id, a text with quotes and line breaks, a label, another column."""
    table = load_table(str(topic_files[0]), ["sentence", "topic", "site"]).columns
    path = tmp_path / "reviews.csv"
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["id", "body", "topic", "site"])
        for number, (text, topic, site) in enumerate(zip(*table.values(), strict=True)):
            out.writerow([number, f'{text}, "so"\n{number}', topic, site])
    return path


def rows(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_what_init_writes_for_a_csv_and_a_model_runs_without_an_edit(
    kind, reviews, tiny_encoder, tiny_decoder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model = {"encoder": tiny_encoder, "decoder": tiny_decoder}[kind]
    assert main(["init", "my", "--data", "reviews.csv", "--model", str(model)]) == 0
    assert "fedlora simulate my/run.yaml" in capsys.readouterr().out
    config = load_config("my/run.yaml")
    causal = kind == "decoder"
    assert config.task.kind == ("causal-lm" if causal else "sequence-classification")
    assert config.lora.target_modules == (["q_proj", "v_proj"] if causal else ["query", "value"])
    assert (config.data.text, config.data.label) == ("body", None if causal else "topic")
    few = ["--set", "federation.rounds=1", "--set", "data.max_length=16"]
    assert main(["check", "my/run.yaml", *few]) == 0
    assert main(["simulate", "my/run.yaml", *few, "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))
    assert told["rounds_completed"] == 1 and told["private"]
    assert (tmp_path / "my" / "run" / "adapter").is_dir()


def test_prompts_and_answers_are_learned_as_such_by_a_causal_model(tiny_decoder, tmp_path, capsys):
    path = tmp_path / "asked.csv"
    lines = [f"{n},what is {n // 2} plus one?,it is {n} {'indeed ' * n}" for n in range(120)]
    path.write_text("\n".join(["id,Question,answer", *lines]) + "\n")
    my = tmp_path / "my"
    assert main(["init", str(my), "--data", str(path), "--model", str(tiny_decoder)]) == 0
    data = load_config(str(my / "run.yaml")).data
    assert (data.prompt, data.completion, data.text) == ("Question", "answer", None)
    train, test = rows(my / "train.csv")[1:], rows(my / "test.csv")[1:]
    assert len(test) == 12 and len(train) == 108  # a tenth, though no two answers are the same
    assert not {prompt for prompt, *_ in train} & {prompt for prompt, *_ in test}
    few = ["--set", "federation.rounds=1", "--set", "data.max_length=16"]
    assert main(["simulate", str(my / "run.yaml"), *few]) == 0
    assert look_through(str(path), text=["answer"], label=None, causal=True).columns == {"text": "answer"}
    capsys.readouterr()


def test_the_two_parts_hold_every_row_once_and_no_text_in_both(reviews, tmp_path, capsys):
    with reviews.open("a", newline="") as file:
        csv.writer(file).writerows([["x", "said twice", "music", "east"]] * 40)
    assert main(["init", str(tmp_path / "a"), "--data", str(reviews)]) == 0
    assert main(["init", str(tmp_path / "b"), "--data", str(reviews)]) == 0
    train, test = rows(tmp_path / "a" / "train.csv"), rows(tmp_path / "a" / "test.csv")
    assert train.pop(0) == test.pop(0) == ["body", "topic", "id", "site"]
    given = [[row[1], row[2], row[0], row[3]] for row in rows(reviews)[1:]]
    assert sorted(train + test) == sorted(given)
    assert not {row[0] for row in train} & {row[0] for row in test} and len(test) >= 0.1 * 361
    for name in ("train.csv", "test.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "NOT protected" in (tmp_path / "a" / "run.yaml").read_text()
    told = capsys.readouterr().out
    assert f"NOT PROTECTED: {tmp_path / 'a' / 'test.csv'}" in told
    assert "learnt from: text 'body', label 'topic'; not from 'id', 'site'\n" in told


def test_a_column_that_says_whose_a_record_is_makes_clients_of_its_values(reviews, tmp_path, capsys):
    assert main(["init", str(tmp_path / "my"), "--data", str(reviews)]) == 0
    run = tmp_path / "my" / "run.yaml"
    asked = run.read_text().partition("with a cohort of as many: ")[2].partition("\n")[0]
    assert asked == '{kind: column, column: "site"}'  # no id, no text, no label
    assert main(["check", str(run), "--set", f"data.partition={asked}"]) == 0
    assert "east" in capsys.readouterr().out


def test_a_model_that_is_not_here_is_said_to_be_asked_of_the_hub(reviews, tiny_encoder, tmp_path, capsys):
    words = ["--data", str(reviews), "--model"]
    assert main(["init", str(tmp_path / "a"), *words, "somebody/there-is-none"]) == 0
    assert "somebody/there-is-none is not on this machine" in capsys.readouterr().out
    assert main(["init", str(tmp_path / "b"), *words, str(tiny_encoder)]) == 0
    assert "not on this machine" not in capsys.readouterr().out


def test_two_texts_are_a_pair(reviews, tmp_path):
    words = ["--data", str(reviews), "--text", "body", "--text", "site", "--label", "topic"]
    assert main(["init", str(tmp_path / "my"), *words]) == 0
    config = load_config(tmp_path / "my" / "run.yaml")
    assert config.data.text == ["body", "site"] and config.data.label == "topic"
    held, (_, *given) = load_corpus(config.data, config.task, 1), rows(reviews)
    pairs = {(row[1], row[3]) for row in given}
    assert {*held.train.texts, *held.test.texts} == pairs
    assert not {first for first, _ in held.train.texts} & {first for first, _ in held.test.texts}


@pytest.mark.parametrize("name", ["a\nseed: 7", "b\rmodel: x", "c\x85d\u2028e", "😀 # f"])
def test_whatever_a_directory_or_a_column_is_called_the_file_can_be_read(reviews, tmp_path, name):
    directory, column = tmp_path / name, f"{name} text"
    directory.mkdir()
    lines = reviews.read_text().splitlines(keepends=True)
    with (directory / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerow(["id", column, "topic", "site"])
        file.writelines(lines[1:])
    assert main(["init", str(directory / "my"), "--data", str(directory / f"{name}.csv")]) == 0
    data = load_config(directory / "my" / "run.yaml").data
    assert (data.text, data.train) == (column, str(directory / "my" / "train.csv"))


def test_columns_without_a_name_are_left_out_and_a_broken_text_is_named(tmp_path):
    path = tmp_path / "own.csv"
    lines = [f"some words {n},{n % 2},,\n" for n in range(60)]
    path.write_text("".join(["text,label,,\n", *lines]))
    assert look_through(str(path), text=(), label=None, causal=False).header == ["text", "label"]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"text": "\ud83d", "label": n % 2}) + "\n" for n in range(60)))
    with pytest.raises(DataError, match=r"own\.jsonl:1: column 'text' holds half a character"):
        look_through(str(path), text=(), label=None, causal=False)


def test_copies_of_the_records_can_be_read_by_their_owner_alone(reviews, tmp_path):
    assert main(["init", str(tmp_path / "a"), "--data", str(reviews)]) == 0
    for name in ("train.csv", "test.csv"):
        assert (tmp_path / "a" / name).stat().st_mode & 0o077 == 0


def test_every_label_is_in_the_test_part_whose_labels_are_the_classes(tmp_path):
    path = tmp_path / "rare.csv"
    lines = [f"some words here {n},{f'own-{n // 6}' if n % 3 == 0 else 'common'}" for n in range(60)]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    found = look_through(str(path), text=(), label=None, causal=False)
    assert {label for _, label in found.test} == {line.partition(",")[2] for line in lines}
    assert len(found.train) + len(found.test) == 60 and len(found.test) < 20


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "1 row; a private run needs hundreds"),
        ("a,b\n", "no rows; a private run needs hundreds"),
        ("text;label\n" + "one;a\n" * 40, "its columns are separated by semicolons; save it with commas"),
        (
            "text,label\n" + "".join(f"word {n},{'' if n == 7 else n % 2}\n" for n in range(40)),
            ":9: 'label' is empty",
        ),
        (
            "text,label\n" + "the same,1\nand this,0\n" * 40,
            "2 different values of 'text' in 80 rows leave 0 to train",
        ),
        ("a,b\n" + "".join(f"{n},{n}x\n" for n in range(40)), "no column looks like a label ('a'); name it"),
    ],
)
def test_a_file_that_cannot_be_guessed_says_what_to_name(tmp_path, text, says):
    path = tmp_path / "odd.csv"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        look_through(str(path), text=(), label=None, causal=False)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("records", "batch", "lr"), [(20, 10, 1.0), (360, 120, 4.0), (1351, 128, 10.0), (90_000, 128, 16.0)]
)
def test_few_records_are_all_drawn_in_each_step_at_a_smaller_rate(tmp_path, records, batch, lr):
    own = Own(
        file="own.csv",
        columns={"text": "t", "label": "l"},
        owners=None,
        records=records,
        directory=tmp_path,
        model="m",
        targets=["query"],
        identity=True,
    )
    (tmp_path / "run.yaml").write_text(own_yaml(own))
    federation = load_config(tmp_path / "run.yaml").federation
    assert (federation.batch_size, federation.optimizer.lr) == (batch, lr)
    assert batch <= records // load_config(tmp_path / "run.yaml").data.partition.clients


def test_options_that_name_no_column_or_no_file_are_refused(reviews, tmp_path, capsys):
    for words, says in (
        (["--data", str(reviews), "--text", "bodi"], "no column 'bodi'"),
        (["--data", str(reviews), "--text", "nocolumn"], "'site'\n"),  # and no guess
        (["--data", str(reviews), "--label", "body"], "different values of 'body'"),
        (["--data", str(reviews), "--text", "body,site"], "write --text body --text site"),
        (
            ["--data", str(reviews), *["--text", "body"] * 2],
            "--text: body, body; name one column, or the two",
        ),
        (
            ["--data", str(reviews), *["--text", "body", "--text", "id", "--text", "site"]],
            "name one column, or the two",
        ),
        (["--label", "topic"], "none are named; write --data FILE"),
        (["--data", str(reviews), "--node"], "leave --data out"),
        (["--data", str(tmp_path / "no.csv")], "no such file"),
        (["--data", str(reviews), "--model", str(tmp_path / "no")], "no such directory; mend the path"),
    ):
        assert main(["init", str(tmp_path / "new"), *words]) == 2
        assert says in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_model_is_seen_without_being_loaded(tiny_encoder, tiny_decoder, tmp_path):
    from transformers import AutoModel

    encoder, decoder = look(tiny_encoder), look(tiny_decoder)
    assert (encoder.causal, decoder.causal) == (False, True)
    assert encoder.attention() == ("query", "value") and decoder.attention() == ("q_proj", "v_proj")
    loaded = AutoModel.from_pretrained(tiny_encoder)
    assert encoder.numbers == sum(parameter.numel() for parameter in loaded.parameters())
    with pytest.raises(ModelError, match=r"no config\.json; name a directory"):
        look(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="write it again"):
        look(tmp_path)
