"""The demo's corpus: a small release of acted, synthetic speech, so that everything runs without a licence."""

from __future__ import annotations

import csv
import io

from gmp_atl.corpora.synthetic import synthesise
from gmp_atl.files import Output, sha256, write_text


def synthesis(*, output: Output) -> None:
    """Synthesise the release into the folder of `output`; `output`, written last, lists each file and its SHA-256."""
    files = synthesise(output.parent)
    index = io.StringIO(newline="")
    rows = csv.writer(index, lineterminator="\n")
    rows.writerow(["path", "sha256"])
    for path in files:
        rows.writerow([path.relative_to(output.parent).as_posix(), sha256(path)])
    write_text(output, index.getvalue())
