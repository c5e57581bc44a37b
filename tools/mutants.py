"""Count the mutants that the tests noticed, module by module: `make mutants`, from `mutmut results --all true`."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable

FLOOR = 85.0
"""Percent of each module's mutants."""
NOTICED = {"killed", "timeout"}


def counts(lines: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Mutants, and those noticed, by module, from lines such as `gmp_atl.losses.x_am_softmax__mutmut_4: killed`."""
    outcomes: dict[str, list[bool]] = defaultdict(list)
    for line in lines:
        mutant, _, outcome = line.strip().partition(": ")
        outcomes[mutant.rpartition(".")[0]].append(outcome in NOTICED)
    return {module: (len(noticed), sum(noticed)) for module, noticed in outcomes.items()}


def main() -> None:
    """Print a table; fail if a module is below the floor, or if there is nothing to count."""
    found = counts(sys.stdin)
    for module, (mutants, killed) in sorted(found.items()):
        print(f"{module:28} {mutants:4} mutants {killed:4} killed {100 * killed / mutants:6.1f} %")
    if not found or any(100 * killed < FLOOR * mutants for mutants, killed in found.values()):
        sys.exit(
            f"At least {FLOOR:g} % of each module's mutants are to be killed; see: mutmut results, mutmut show NAME"
        )


if __name__ == "__main__":
    main()
