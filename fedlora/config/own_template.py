"""The run.yaml that `fedlora init --data FILE` writes: somebody's own records and, if named, their own model."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OWN_YAML = """\
# fedlora simulate {name}
#
# {records:,} records of {file}, dealt out to {clients} simulated owners. Every key: `fedlora schema`.
seed: 1

model:
  name: {model}   # a Hugging Face id or a local directory

task:
{task}

lora:
  r: 4                           # rank
  lora_alpha: 4                  # the adapted layer computes W x + (lora_alpha / r) B A x
  target_modules: {targets}
  init: centred                  # the first A: orthonormal, and blind to the mean input

data:
  source: files
  train: {train}
  test: {test}
  # The two are {file}, split by `fedlora init`: a tenth of the texts, by their digests, is for the test.
  # The test records are scored at the server and NOT protected: replace them by public ones where they are private.
{columns}
  max_length: 64                 # tokens kept of each record
  partition: {{kind: iid, clients: {clients}}}   # or {natural}

federation:
  rounds: 20
  cohort: {clients}                      # clients asked in a round
  local_steps: 1                 # DP-SGD steps of a client in a round
  batch_size: {batch}                 # expected size of a Poisson draw; more records, less noise
  optimizer: {{name: sgd, lr: {lr}, decay: linear}}
  evaluate_every: 5              # rounds between two scores

method:
  name: fedsvd                   # others: docs/methods.md

# The promise, for each record of each client, over everything that client ever releases.
privacy:
  target_epsilon: 8.0            # smaller is more private
  target_delta: {delta}          # below 1 / records of the largest client
  max_grad_norm: 2.0             # bound on one record's gradient
  max_participations: 20         # what the noise is for; the ledger refuses the next
  tuned_on: undeclared           # or nothing, public-data, {{private_runs: 10}}

runtime:
  kind: local                    # or ray: all cores of this machine, or a cluster

output: {output}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """What the config is made of. columns: by their keys in `data`. owners: the column that may say whose a record is.
    records: to train on. directory: of all that `init` writes. identity: the model's pooler is not used.
    """

    file: str
    columns: Mapping[str, str | Sequence[str]]
    owners: str | None
    records: int
    directory: Path
    model: str
    targets: Sequence[str]
    identity: bool

    @property
    def train(self) -> Path:
        """Where the records to train on are."""
        return self.directory / "train.csv"

    @property
    def test(self) -> Path:
        """Where those to score on are."""
        return self.directory / "test.csv"


def own_yaml(own: Own) -> str:
    """A run that runs as it stands.

    With few records all are drawn in each step, where noise is least beside them; and since it is large all the same,
    the learning rate of a head is smaller: as the noise of a round's mean, by records and the root of clients.
    """
    clients = max(2, min(8, own.records // 100))
    smallest, largest = own.records // clients, math.ceil(own.records / clients)
    rate = min(16.0, max(1.0, float(round(smallest * math.sqrt(clients) / 50))))
    return OWN_YAML.format(
        name=_one_line(str(own.directory / "run.yaml")),
        records=own.records,
        file=_one_line(own.file),
        clients=clients,
        model=_quoted(own.model),
        task="\n".join(_task(own)),
        targets=_quoted(list(own.targets)),
        train=_quoted(str(own.train)),
        test=_quoted(str(own.test)),
        natural=_natural(own),
        columns="\n".join(f"  {key}: {_quoted(name)}" for key, name in own.columns.items()),
        batch=max(4, min(128, smallest)),
        lr=rate if "label" in own.columns else 2.0,
        delta=f"{min(1e-5, 10.0 ** -(1 + math.ceil(math.log10(largest)))):.1e}",
        output=_quoted(str(own.directory / "run")),
    )


def _quoted(value: str | Sequence[str]) -> str:
    """As YAML reads it: JSON is YAML but for characters beyond 16 bits, and what other ends of line there are."""
    plain = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff]", lambda found: f"\\u{ord(found[0]):04x}", plain)


def _one_line(words: str) -> str:
    """In a comment, which a line's end would end."""
    return "".join(c if c.isprintable() else " " for c in words)


def _natural(own: Own) -> str:
    """Who else could hold the records."""
    if own.owners is None:
        return "dirichlet, shards, quantity, column: the natural one"
    return (
        f"a client for each value, with a cohort of as many: {{kind: column, column: {_quoted(own.owners)}}}"
    )


def _task(own: Own) -> list[str]:
    if "label" in own.columns:
        return [
            "  kind: sequence-classification",
            "  head: trained                  # clipped, noised and sent like B",
            f"  pooler: {'identity' if own.identity else 'checkpoint'}",
        ]
    if "prompt" in own.columns:
        return [
            "  kind: causal-lm                # prompts are read, completions are learned",
            r'  template: "{prompt}\n"         # and then the completion; or chat: as the tokenizer has it',
        ]
    return ["  kind: causal-lm                # next-token prediction on the text column"]
