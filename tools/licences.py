"""Write docs/licences.md, the licence of every locked package: `make licences`.

Each package tells its own in the metadata of what is installed in .venv; names and versions are the locks'.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "licences.md"

HEAD = """\
# Licences of the packages

Made from requirements/main.lock and the packages' own metadata by `make licences`; do not edit. gmp-atl itself is under
the [MIT licence](../LICENSE). openSMILE, which is optional and not in this list, is for private and research use.
eSpeak NG, which espeakng-loader brings and only the demo's synthesis calls, is under the GPL, version 3 or later.

| Package | Version | Licence, as the package tells it |
|---|---|---|
"""


def locked() -> dict[str, str]:
    """Versions of requirements/main.lock by name."""
    text = (ROOT / "requirements" / "main.lock").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", text, re.MULTILINE))


def licence(name: str) -> str:
    """From `License-Expression`, the classifiers, or the first line of `License`, whichever is there."""
    told = metadata.metadata(name)
    classifiers = [each.rpartition(" :: ")[2] for each in told.get_all("Classifier") or [] if "License" in each]
    texts = [*(told.get_all("License-Expression") or []), "; ".join(classifiers), *(told.get_all("License") or [])]
    first = next((text for text in texts if text and text != "UNKNOWN"), "not told")
    return first.splitlines()[0].replace("|", "\\|")[:100]


def page() -> str:
    """The text of docs/licences.md."""
    return HEAD + "".join(f"| {name} | {version} | {licence(name)} |\n" for name, version in sorted(locked().items()))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
