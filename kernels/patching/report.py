"""What `optimize` did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class OptimizeReport:
    """What `optimize` replaced and what it left.

    Attributes:
        replaced: names of modules, to what was done to each.
        left: names of modules, to the reason why each was left as it is.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([*_lines("replaced", self.replaced), *_lines("left", self.left)])


def _lines(what: str, modules: dict[str, str]) -> list[str]:
    """A heading, and under it what is said and of how many modules."""
    said = Counter(modules.values())
    return [f"{what}: {len(modules)} module{'' if len(modules) == 1 else 's'}"] + [
        f"  {number} × {text}" for text, number in said.most_common()
    ]
