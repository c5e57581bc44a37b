"""Print the shares of lines and branches that tests reach: `make coverage`, from `coverage json -o -`."""

from __future__ import annotations

import json
import sys

FLOORS = {"statements": 95.0, "branches": 90.0}
"""Percent of the package's."""


def main() -> None:
    """Fail if a share is below its floor."""
    totals = json.load(sys.stdin)["totals"]
    shares = {kind: totals[f"percent_{kind}_covered"] for kind in FLOORS}
    for kind, share in shares.items():
        print(f"{share:.1f} % of {totals[f'num_{kind}']} {kind}, of which {FLOORS[kind]:g} % are asked for")
    if any(share < FLOORS[kind] for kind, share in shares.items()):
        sys.exit("Tests reach too little of the package; `coverage report --show-missing` names the lines")


if __name__ == "__main__":
    main()
