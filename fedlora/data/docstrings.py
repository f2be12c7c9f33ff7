"""The built-in offline source: docstrings of the packages installed here, labelled by their package.

Sources are parsed, never imported. What comes out depends on the installed versions and the seed alone.
"""

import ast
import hashlib
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fedlora.config.data import Docstrings
from fedlora.data.corpus import Corpus
from fedlora.data.records import Records
from fedlora.data.table import nearest, shown
from fedlora.errors import DataError
from fedlora.seeds import seed_for

STDLIB = "stdlib"

# Packages that fedlora's own dependencies bring along, each with well over a thousand distinct docstrings.
DEFAULT_PACKAGES = ("flwr", "networkx", "ray", "scipy", STDLIB, "sympy", "torch", "transformers")

TEST_SHARE = 0.1
MIN_CHARACTERS, MAX_CHARACTERS, MIN_WORDS = 20, 400, 4

# Parsing stops at so many times max_per_class: a large package costs no more than a middling one, and the
# surplus makes up for what other packages share.
SURPLUS = 1.25

# Tests, copies of other people's packages, and nothing that this package wrote.
SKIPPED_DIRECTORIES = frozenset(
    {"test", "tests", "_vendor", "vendor", "_vendored", "vendored"}
    | {
        "third_party",
        "thirdparty",
        "thirdparty_files",
        "extern",
        "externals",
        "_bundled",
        "site-packages",
        "dist-packages",
        "node_modules",
        "__pycache__",
    }
)
SKIPPED_FILES = re.compile(r"(test_.*|.*_test|.*_tests|conftest|.*_pb2|.*_pb2_grpc)\.py")

# From here on a docstring speaks of parameters or shows a session; ".. " and ":param" are reStructuredText.
SECTION = re.compile(
    r">>>|\.\. |:\w+|@\w+|(Args|Arguments|Attributes|Examples?|Inputs?|Keyword Args|Notes?|Outputs?"
    r"|Parameters|Params|Raises|References|Returns?|See Also|Shape|Usage|Warnings?|Yields)\s*:?\s*$",
    re.IGNORECASE,
)
UNDERLINE = re.compile(r"[\W_]+$")

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def packages_of(data: Docstrings) -> list[str]:
    """The packages that are told apart, in the order of their labels."""
    return sorted(set(data.packages or DEFAULT_PACKAGES))


def docstring_corpus(data: Docstrings, seed: int, *, causal: bool) -> Corpus:
    """Up to `max_per_class` distinct first paragraphs a package, about a tenth of each held out as test.

    No text, case-folded, occurs twice; one that several packages share stays with the first in alphabetical
    order. The one column to partition by is `package`.

    Raises:
        DataError: a package is missing or has hardly any docstrings; the partition column is another.
    """
    packages = packages_of(data)
    roots = _roots(packages)
    by_column = data.partition.kind == "column"
    if data.partition.kind == "column" and data.partition.column != "package":
        raise DataError(
            f"docstrings have no column {data.partition.column!r} to partition by; they have 'package'"
        )
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    seen: set[str] = set()
    for label, package in enumerate(packages):
        texts = _chosen(package, roots[package], data.max_per_class, seed, seen)
        held_out = max(1, round(TEST_SHARE * len(texts)))
        test += [(text, label) for text in texts[:held_out]]
        train += [(text, label) for text in texts[held_out:]]
    groups = [packages[label] for _, label in train] if by_column else None
    return Corpus(
        train=_records(train, groups), test=_records(test, None), classes=() if causal else tuple(packages)
    )


def _records(rows: list[tuple[str, int]], groups: list[str] | None) -> Records:
    labels = np.array([label for _, label in rows], dtype=np.int64)
    return Records(texts=[text for text, _ in rows], labels=labels, groups=groups)


def _chosen(package: str, root: Path, most: int, seed: int, seen: set[str]) -> list[str]:
    """At most `most` of the package's texts in random order, none in `seen`, to which all are added."""
    folded = {text.casefold(): text for text in reversed(_collected(root, round(SURPLUS * most)))}
    texts = [folded[key] for key in sorted(folded) if key not in seen]
    seen.update(folded)
    if len(texts) < 10:
        raise DataError(
            f"package {package!r} at {str(root)!r} has {len(texts)} usable docstrings; need 10, "
            f"so leave it out of data.packages"
        )
    shuffle = np.random.Generator(np.random.Philox(seed_for(seed, "docstrings", package)))
    return [texts[i] for i in shuffle.permutation(len(texts))[:most]]


def _collected(root: Path, enough: int) -> list[str]:
    """Distinct texts of whole files, in the order of a hash of their relative paths, until enough."""
    texts: dict[str, str] = {}
    for path in _source_files(root):
        for docstring in docstrings_of(path):
            text = first_paragraph(docstring)
            if len(text) >= MIN_CHARACTERS and text.count(" ") + 1 >= MIN_WORDS:
                texts.setdefault(text.casefold(), text)
        if len(texts) >= enough:
            break
    return list(texts.values())


def _source_files(root: Path) -> list[Path]:
    found: list[str] = []
    for directory, children, files in os.walk(root):
        children[:] = [child for child in children if child not in SKIPPED_DIRECTORIES]
        relative = Path(directory).relative_to(root)
        sources = [name for name in files if name.endswith(".py") and not SKIPPED_FILES.fullmatch(name)]
        found += [(relative / name).as_posix() for name in sources]
    return [root / name for name in sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())]


def docstrings_of(path: Path) -> Iterator[str]:
    """The raw docstrings of the module, its classes and functions; none if this Python cannot parse it."""
    try:
        with warnings.catch_warnings():  # other people's invalid escapes are not our reader's concern
            warnings.simplefilter("ignore")
            pending: list[ast.AST] = [ast.parse(path.read_bytes())]
    except (SyntaxError, ValueError, RecursionError, OSError):
        # Packages ship templates and code for other versions; what cannot be parsed has no docstring here.
        return
    while pending:
        node = pending.pop()
        if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node, clean=False)):
            yield docstring
        pending.extend(_blocks(node))


def _blocks(node: ast.AST) -> Iterable[ast.AST]:
    """Statements inside a statement. Expressions, most of the tree, hold no docstrings and are not walked."""
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        yield from getattr(node, field, ())


def first_paragraph(docstring: str) -> str:
    """The first paragraph, or what of it precedes a section, on one line, cut at a word."""
    lines: list[str] = []
    for line in map(str.strip, docstring.splitlines()):
        if SECTION.match(line) or (lines and not line):
            break
        if line and not UNDERLINE.match(line):
            lines.append(line)
    text = " ".join(" ".join(lines).split())
    if len(text) <= MAX_CHARACTERS:
        return text
    return text[: MAX_CHARACTERS + 1].rsplit(" ", 1)[0][:MAX_CHARACTERS]


def _roots(packages: list[str]) -> dict[str, Path]:
    roots = {package: _root(package) for package in packages}
    found = {package: root for package, root in roots.items() if root is not None}
    missing = [package for package in packages if package not in found]
    if missing:
        raise DataError(
            f"data.packages: {shown(missing)} not installed as a top-level package here; found "
            f"{shown(list(found))}{nearest(missing[0], list(DEFAULT_PACKAGES))}; install or drop it"
        )
    return found


def _root(package: str) -> Path | None:
    if package == STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    if not package.isidentifier():  # finding a dotted name would import its parents
        return None
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module that was put into sys.modules by hand
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None
