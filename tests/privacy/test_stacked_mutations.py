"""Each line of the private step of several clients, broken on purpose, makes the check fail that is named beside it."""

import pytest

from . import stacked_checks as checks
from .mutants import Mutation, room

ALONE = "each_client_releases_what_it_would_alone"
NEIGHBOURS = "a_record_moves_its_owners_sum_alone_and_by_at_most_the_bound"
EMPTY = "an_empty_draw_is_noised_as_any_other"
NON_FINITE = "a_non_finite_record_is_as_good_as_absent"
MIXED = "what_would_mix_clients_is_refused"
LACKING = "what_copies_would_lack_is_refused"

ROW = "        _released({name: total[client] for name, total in sums.items()}, stack.trained, release)\n"
RELEASES = "for client, release in enumerate(releases)"
GROUPED = "clipped_sums(self.ops, rows, owners, stack.clients, max_grad_norm)"
SHARES = "shares[owners, torch.arange(len(clips), device=clips.device)] = clips"

MUTATIONS = (
    Mutation("everybody gets the sum of all", "clipping", SHARES, "shares[:] = clips", NEIGHBOURS),
    Mutation("owners one place off", "clipping", SHARES, SHARES.replace("[owners,", "[owners.roll(1),"), NEIGHBOURS),
    Mutation("no clip", "clipping", SHARES, SHARES.replace("= clips", "= (clips > 0).double()"), NEIGHBOURS),
    Mutation("non-finite multiplied by zero", "clipping", "if len(rows) and not float(largest.min()) > 0:", "if False:",
             NON_FINITE),
    Mutation("summed in float32", "torch_ops", "shares @ part.to(torch.float64)",
             "(shares.float() @ part.float()).double()", NEIGHBOURS),
    Mutation("each client's sum to its neighbour", "torch_ops", "shares @ part.to(torch.float64)",
             "(shares @ part.to(torch.float64)).roll(1, 0)", NEIGHBOURS),
    Mutation("an owner counted from the end", "clipping", "((owners >= 0) &", "(", MIXED),
    Mutation("the clip on a client, not on a record", "direct_engine", GROUPED,
             "clipped_sums(self.ops, torch.stack([rows[owners == c].sum(dim=0) for c in range(stack.clients)]),"
             " torch.arange(stack.clients), stack.clients, max_grad_norm)", ALONE),
    Mutation("each tensor clipped by itself", "direct_engine", GROUPED,
             "torch.cat([clipped_sums(self.ops, rows[:, c], owners, stack.clients, max_grad_norm)"
             " for c, _ in columns.places.values()], dim=1)", NEIGHBOURS),
    Mutation("the last microbatch only", "direct_engine", "_plus(sums, " + GROUPED,
             "_plus(None, " + GROUPED, ALONE),
    Mutation("another client's weights", "stacked", "self.weight.detach()[self.owners]",
             "self.weight.detach()[self.owners.roll(1)]", ALONE),
    Mutation("the first client's bias for all", "stacked", "self.bias.detach()[self.owners]",
             "self.bias.detach()[torch.zeros_like(self.owners)]", ALONE),
    Mutation("owners left over from another microbatch", "stacked",
             "                layer.owners = None  #", "                pass  #", MIXED),
    Mutation("rows not counted", "stacked", "if self.owners is None or len(self.owners) != len(h):",
             "if self.owners is not None:\n            self.owners = self.owners.new_zeros(len(h))\n        else:",
             MIXED),
    Mutation("one owner for several records", "clipping", "owners.shape != clips.shape or", "", MIXED),
    Mutation("hooks pass", "stacked",
             "if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks:",
             "if False:", LACKING),
    Mutation("a half-trained layer passes", "stacked",
             "if layer.weight is None or (linear.bias is not None and layer.bias is None):", "if False:", LACKING),
    Mutation("no noise for an empty draw", "step", ROW,
             "        _released({name: total[client] for name, total in sums.items()}, stack.trained, release)\n"
             "        if any(total[client].any() for total in sums.values())\n"
             "        else {name: torch.zeros_like(total[client]) for name, total in sums.items()}\n", EMPTY),
    Mutation("one noise for all", "step", RELEASES,
             "for client, release in enumerate([releases[0]] * len(releases))", EMPTY),
    Mutation("each noised as its neighbour", "step", RELEASES,
             "for client, release in enumerate([*releases[1:], releases[0]])", ALONE),
    Mutation("only the first row kept", "step", "[row[name] for row in rows]",
             "[rows[0][name] for row in rows]", ALONE),
    Mutation("two clients under one purpose", "step",
             "if len({release.purpose for release in releases}) != len(releases):", "if False:", MIXED),
    Mutation("two bounds", "step", "if len({release.bound for release in releases}) != 1:", "if False:", MIXED),
    Mutation("a client without release", "step", "if len(releases) != stack.clients:", "if False:", MIXED),
)  # fmt: skip


@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_the_real_room_passes(check):
    check(room())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.module}: {mutation.name}")
def test_mutants_are_caught(mutation):
    mutant = room(mutation.module, mutation.old, mutation.new)
    with pytest.raises(AssertionError):
        {check.__name__: check for check in checks.CHECKS}[mutation.caught_by](mutant)


def test_every_check_catches_a_mutant():
    assert {mutation.caught_by for mutation in MUTATIONS} == {check.__name__ for check in checks.CHECKS}
