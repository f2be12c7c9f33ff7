"""The commented files that `fedlora init` writes: each runs, or loads, as it stands."""

from fedlora.config.yaml_text import render

RUN_YAML = """\
# fedlora simulate run.yaml
#
# Eight simulated owners fine-tune a sentence encoder to tell which Python package a docstring comes from.
# Data and model are on this machine already: nothing is downloaded. Every key: `fedlora schema`.
seed: 1

model:
  name: sentence-transformers/all-MiniLM-L6-v2   # a Hugging Face id or a local directory
  dtype: float32                                 # of the frozen weights; bfloat16 on GPUs that have it

task:
  kind: sequence-classification                  # or causal-lm
  head: trained                                  # clipped, noised and sent like B; or frozen
  pooler: identity                               # this checkpoint has an untrained one; else: checkpoint

lora:
  r: 4                                           # rank
  lora_alpha: 4                                  # the adapted layer computes W x + (lora_alpha / r) B A x
  target_modules: [query, value]                 # ends of the names of the linear layers to adapt
  layers_to_transform: [4, 5]                    # null: all. Fewer trained numbers carry less noise
  init: centred                                  # the first A: orthonormal, or blind to the mean input as well

data:
  source: docstrings                             # built in, offline; your own: see below
  max_per_class: 3000                            # at most so many records of one package
  max_length: 32                                 # tokens kept of each record
  max_test_examples: 1000                        # of the public test records; null: all
  partition: {kind: dirichlet, clients: 8, alpha: 1.0, min_examples: 500}   # or iid, shards, quantity, column

# To use your own files instead, replace the section above by:
# data:
#   source: files
#   train: train.tsv                             # tsv, csv, jsonl, parquet, also gzipped
#   test: test.tsv                               # public: scored at the server
#   text: sentence                               # one column, or a list of two for pairs
#   label: label
#   max_length: 64
#   partition: {kind: dirichlet, clients: 8, alpha: 1.0}

federation:
  rounds: 20
  cohort: 8                                      # clients asked in a round, or {probability: 0.5}
  local_steps: 1                                 # DP-SGD steps of a client in a round
  batch_size: 128                                # expected size of a Poisson draw
  optimizer: {name: sgd, lr: 16.0, decay: linear}   # clipped gradients are small: the rate is large
  weighting: uniform                             # or examples: by declared record counts
  evaluate_every: 5                              # rounds between two scores

method:
  name: fedsvd                                   # others: docs/methods.md
  refactor_every: 1                              # rounds between two refactorisations
  stale: {beta: 0.0, memory: disk}               # FedStale: 0 forgets absent clients, 1 remembers all, or adaptive

# The promise, for each record of each client, over everything that client ever releases.
# `privacy: none` switches it off; every output then says NOT PRIVATE.
privacy:
  target_epsilon: 8.0                            # smaller is more private; 1 is strong, 8 is usual in papers
  target_delta: 1.0e-5                           # must be below 1 / records of the largest client
  max_grad_norm: 2.0                             # bound on one record's gradient
  max_participations: 20                         # what the noise is for; the ledger refuses the next
  accountant: pld                                # or prv, rdp
  tuned_on: undeclared                           # or nothing, public-data, {private_runs: 10}: the statement tells

runtime:
  kind: ray                                      # or local, flower; same seed, same result in each
  workers: auto

output: runs/first
"""


def run_yaml(name: str) -> str:
    """RUN_YAML with its output in runs/NAME; an empty name leaves it as it is."""
    head, _, _ = RUN_YAML.rpartition("output: ")
    return head + render({"output": f"runs/{name}"}) if name else RUN_YAML


NODE_YAML = """\
# What a data owner decides. No server can change a line of it; the node refuses what does not fit.
# fedlora check node.yaml tells what it amounts to: noise, epsilon, and the lines for `accept:`.
client: hospital-a                               # the name under which the server knows this node

data:
  source: files
  train: /data/train.tsv                         # stays on this node: tsv, csv, jsonl, parquet, also gzipped
  text: sentence                                 # one column, or a list of two for pairs
  label: label                                   # leave it out for causal-lm
  max_length: 64                                 # tokens kept of each record

declared_records: 5000                           # told to the server: public; sets rate and noise

# What has to agree with the server's run.yaml: this is the one of `fedlora init`. `fedlora check run.yaml node.yaml`
# tells what does not.
classes: [flwr, networkx, ray, scipy, stdlib, sympy, torch, transformers]   # same list and order everywhere
model: {name: sentence-transformers/all-MiniLM-L6-v2}
task: {kind: sequence-classification, head: trained, pooler: identity}
lora: {r: 4, lora_alpha: 4, target_modules: [query, value], layers_to_transform: [4, 5]}
max_grad_norm: 2.0                               # bound on one record's gradient

work:                                            # the noise is calibrated for exactly this
  batch_size: 128                                # expected size of a Poisson draw
  local_steps: 1                                 # steps of one participation; more are refused
  optimizer: {name: sgd, lr: 16.0}               # lr: the most that a server may ask for

ledger: /var/lib/fedlora/ledger.jsonl            # everything ever spent. Back it up

budget:                                          # for these records, over all runs and all servers
  target_epsilon: 8.0
  target_delta: 1.0e-5                           # must be below 1 / declared_records
  max_participations: 20                         # the ledger refuses the next one

min_noise_multiplier: 0.5                        # noise never goes below this
device: auto                                     # auto, cpu, cuda
threads: 1                                       # cores that training uses
"""
