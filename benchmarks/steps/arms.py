"""The names of the variants; loads nothing."""

PEFT, HOOKS, GHOST = "plain PEFT", "Opacus hooks", "Opacus ghost"
FUNCTORCH, MICRO = "functorch", "microbatches of 1"


def plain(kernels: str) -> str:
    """A step without privacy on our own model."""
    return f"plain, {kernels}"


def ours(kernels: str) -> str:
    """Our private step."""
    return f"ours, {kernels}"


def is_plain(arm: str) -> bool:
    """Whether the arm clips nothing."""
    return arm.startswith("plain")
