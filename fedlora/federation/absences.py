"""A round that too few clients answered: who stayed away and why, and the next move that suits it."""

from collections.abc import Mapping, Sequence

from fedlora.config.schema import Federation
from fedlora.errors import FedLoraError, IncompleteError, PrivacyError
from fedlora.values import RefusalReason, RoundReport

MISSED = "missed.json"
"""In the run directory: the last such round."""
SHOWN = 5
"""Names behind one reason; a round may ask thousands."""
_BACK = "resume the run when clients are back"
_ELSEWHERE = "or ask less in a run of another output"
_MOVES = {
    RefusalReason.BUDGET: "the budget there does not pay for this round: have `budget` in those node.yaml raised, "
    f"{_ELSEWHERE}; a simulation begins again in another output, with fewer rounds or another `privacy`",
    RefusalReason.BAD_REQUEST: "their node.yaml does not allow what was asked: each node's own log says which key; "
    f"have it changed there, {_ELSEWHERE}",
    RefusalReason.NO_DATA: "they hold no record: have `data` in those node.yaml mended",
    RefusalReason.LEDGER: "their ledgers are damaged or went back: the node's log, or the server's, says how",
    RefusalReason.FAILED: f"{_BACK}; if they are, their own logs say what failed",
    RefusalReason.MALFORMED: "what they sent is no reply: have the same fedlora installed there and here",
    RefusalReason.UNSOUND: "what they sent is not what it says of itself: the server's log says how",
}


def require_enough(report: RoundReport, federation: Federation, kept: str) -> None:
    """Passes a round that as many clients answered as it needs.

    Args:
        report: of the round.
        federation: its `min_clients`.
        kept: what is left of the run, for the message.

    Raises:
        PrivacyError: too few answered, and budgets are why: as many refused for theirs that the rest cannot suffice.
        IncompleteError: too few answered; they may yet.
    """
    needed = min(federation.min_clients, len(report.asked))
    if len(report.answered) < needed:
        raise _too_few(report, needed, kept)


def by_reason(refused: Mapping[str, str]) -> str:
    """Who refused for which reason: `budget: a, b; failed: c`. Of many names, the first."""
    who: dict[str, list[str]] = {}
    for client, joined in sorted(refused.items()):
        for reason in joined.split("; "):
            who.setdefault(reason, []).append(client)
    return "; ".join(f"{reason}: {_names(clients)}" for reason, clients in sorted(who.items()))


def _too_few(report: RoundReport, needed: int, kept: str) -> FedLoraError:
    rejected = [f"{client}: {fault}" for client, fault in report.rejected.items()][:SHOWN]
    absent = "; ".join(filter(None, (by_reason(report.refused), *rejected)))
    answered = f"round {report.round}: {len(report.answered)} of {len(report.asked)} clients answered"
    codes = {code for joined in report.refused.values() for code in joined.split("; ")}
    spent = {
        client for client, joined in report.refused.items() if RefusalReason.BUDGET in joined.split("; ")
    }
    if len({*report.answered, *(set(report.asked) - spent)}) < needed:
        # No key of run.yaml is named: the line of none is to be mended.
        return PrivacyError(
            f"{answered}, {needed} have to ({absent}); {_MOVES[RefusalReason.BUDGET]}; {kept}"
        )
    moves = [move for code, move in _MOVES.items() if code in codes] or [_BACK]
    return IncompleteError(
        f"{answered}, federation.min_clients is {needed} ({absent or 'nobody replied'}); {'; '.join(moves)}; {kept}"
    )


def _names(clients: Sequence[str]) -> str:
    more = len(clients) - SHOWN
    return ", ".join(clients[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")
