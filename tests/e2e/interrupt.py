"""Runs that are stopped by their user."""


class Interrupt:
    """A listener that does what Ctrl-C does, at the n-th event of a kind."""

    def __init__(self, kind: type, at: int) -> None:
        self.kind, self.left = kind, at

    def __call__(self, event: object) -> None:
        self.left -= isinstance(event, self.kind)
        if self.left < 0:
            raise KeyboardInterrupt
