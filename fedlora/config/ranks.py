"""The rank of a site, by PEFT's rule for `rank_pattern`."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.config.schema import Lora


def matching(patterns: Iterable[str], site: str) -> str | None:
    """The first pattern that is the end of the site's path, from a dot on; None: none is. As PEFT matches them."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", site)), None)


def rank_of(lora: "Lora", site: str) -> int:
    """The rank of a site: of the first pattern that matches it, else `lora.r`."""
    patterns = lora.rank_pattern or {}
    found = matching(patterns, site)
    return lora.r if found is None else patterns[found]


def largest_rank(lora: "Lora") -> int:
    """No site has a larger one."""
    return max(lora.r, *(lora.rank_pattern or {}).values()) if lora.rank_pattern else lora.r
