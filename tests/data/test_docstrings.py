import numpy as np
import pytest

from fedlora.config.data import Column, Docstrings, Iid
from fedlora.config.schema import CausalLm, Classification
from fedlora.data import load_corpus
from fedlora.data.docstrings import MAX_CHARACTERS, first_paragraph
from fedlora.errors import DataError

CLASSIFY = Classification(kind="sequence-classification")
SHARED = "Return the very same sentence everywhere."


def settings(packages, most=1000, partition=None):
    return Docstrings(
        source="docstrings", packages=packages, max_per_class=most, max_length=8,
        partition=partition or Iid(kind="iid", clients=1),
    )  # fmt: skip


def write_package(root, name, functions):
    folder = root / name
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text(
        '"""Raises when it is imported, which nobody does."""\nraise SystemExit\n'
    )
    (folder / "tests" / "test_it.py").write_text('"""A docstring that only tests would have."""\n')
    (folder / "template.py").write_text("def {{ not python }}")
    for part in range(4):
        body = [
            f'def f{i}():\n    """Compute item {i} of {name} for you."""\n' for i in range(part, functions, 4)
        ]
        (folder / f"part{part}.py").write_text("\n".join([f'"""{SHARED}"""', *body]))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    write_package(tmp_path, "aardvark_docs", 200)
    write_package(tmp_path, "beaver_docs", 40)
    monkeypatch.syspath_prepend(str(tmp_path))
    return ["beaver_docs", "aardvark_docs"]


def test_every_distinct_docstring_comes_once_with_its_package_as_label(packages):
    corpus = load_corpus(settings(packages), CLASSIFY, 3)
    assert corpus.classes == ("aardvark_docs", "beaver_docs")
    rows = [
        (text, corpus.classes[label])
        for records in (corpus.train, corpus.test)
        for text, label in zip(records.texts, records.labels, strict=True)
    ]
    wanted = {(f"Compute item {i} of aardvark_docs for you.", "aardvark_docs") for i in range(200)}
    wanted |= {(f"Compute item {i} of beaver_docs for you.", "beaver_docs") for i in range(40)}
    module = (
        "Raises when it is imported, which nobody does."  # shared by both: stays with the first, like SHARED
    )
    assert len(rows) == len(set(rows))
    assert set(rows) == wanted | {(SHARED, "aardvark_docs"), (module, "aardvark_docs")}


def test_a_tenth_of_each_label_is_test_and_no_label_exceeds_its_limit(packages):
    corpus = load_corpus(settings(packages, most=100), CLASSIFY, 3)
    train, test = (np.bincount(records.labels) for records in (corpus.train, corpus.test))
    assert train[0] + test[0] == 100
    assert 40 <= train[1] + test[1] <= 42  # of its own, and what the other, cut short, did not show first
    assert test.tolist() == [10, 4]


def test_the_seed_chooses_and_nothing_else_does(packages):
    one, same = (load_corpus(settings(packages, 50), CLASSIFY, 1) for _ in range(2))
    other = load_corpus(settings(packages, 50), CLASSIFY, 2)
    assert one.train.texts == same.train.texts
    assert one.test.texts == same.test.texts
    assert set(one.test.texts) != set(other.test.texts)


def test_real_packages_have_no_text_in_both_train_and_test():
    corpus = load_corpus(settings(["stdlib", "rich", "typer"], most=150), CLASSIFY, 1)
    assert corpus.classes == ("rich", "stdlib", "typer")
    train, test = ({text.casefold() for text in r.texts} for r in (corpus.train, corpus.test))
    assert not train & test
    assert len(train) + len(test) == len(corpus.train) + len(corpus.test)
    assert all(20 <= len(text) <= MAX_CHARACTERS and len(text.split()) >= 4 for text in train | test)


def test_a_language_model_gets_the_same_texts_without_classes(packages):
    corpus = load_corpus(settings(packages), CausalLm(kind="causal-lm"), 3)
    assert corpus.classes == ()
    assert corpus.train.texts == load_corpus(settings(packages), CLASSIFY, 3).train.texts


def test_packages_can_be_the_clients(packages):
    by_package = settings(packages, partition=Column(kind="column", column="package"))
    groups = load_corpus(by_package, CLASSIFY, 3).train.groups
    assert set(groups) == set(packages)
    with pytest.raises(DataError, match=r"no column 'author'"):
        load_corpus(settings(packages, partition=Column(kind="column", column="author")), CLASSIFY, 3)


def test_a_missing_package_names_those_found():
    with pytest.raises(DataError, match=r"'no_such_package' not installed.*found 'stdlib'"):
        load_corpus(settings(["no_such_package", "stdlib"]), CLASSIFY, 0)
    with pytest.raises(DataError, match=r"'json.decoder' not installed"):
        load_corpus(settings(["json.decoder", "stdlib"]), CLASSIFY, 0)


def test_a_package_with_hardly_any_docstrings_is_refused(packages, tmp_path):
    write_package(tmp_path, "mouse_docs", 5)
    with pytest.raises(DataError, match=r"'mouse_docs' .* usable docstrings"):
        load_corpus(settings([*packages, "mouse_docs"]), CLASSIFY, 0)


@pytest.mark.parametrize(
    ("docstring", "text"),
    [
        ("\n    First line\n    goes   on.\n\n    Second paragraph.\n", "First line goes on."),
        ("Title\n=====\n\nBody text.", "Title"),
        ("Do it.\n:param x: a number", "Do it."),
        ("Do it.\nArgs:\n  x: a number", "Do it."),
        ("Do it.\n>>> do()\n1", "Do it."),
        ("Parameters\n----------\nx : int", ""),
        (">>> only()\n1", ""),
        ("Arguments may follow this sentence.", "Arguments may follow this sentence."),
    ],
)
def test_the_first_paragraph_ends_at_a_blank_line_or_a_section(docstring, text):
    assert first_paragraph(docstring) == text


def test_a_long_paragraph_is_cut_at_a_word():
    cut = first_paragraph("word " * 200)
    assert len(cut) <= MAX_CHARACTERS
    assert set(cut.split()) == {"word"}
    assert len(first_paragraph("x" * 1000)) == MAX_CHARACTERS
