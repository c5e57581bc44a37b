"""Classical reference, first half: the eGeMAPSv02 functionals of every clip, computed by openSMILE.

openSMILE is licensed for research use only, and therefore optional.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from gmp_atl.audio import recording
from gmp_atl.errors import UserError
from gmp_atl.files import AudioRoot, Output
from gmp_atl.formats import FUNCTIONALS, UTTERANCES
from gmp_atl.frames import SAMPLE_RATE
from gmp_atl.progress import Meter


def functionals(*, utterances: Path, audio_root: AudioRoot, output: Output) -> None:
    """Write 88 functionals per clip, without looking at any label.

    A clip under 60 ms is too short for openSMILE, which warns and gives NaN throughout; the baseline imputes
    that from its training fold.

    Args:
        utterances: Utterance table.
        audio_root: Folder that the paths in it are relative to.
        output: Parquet file of functionals.

    Raises:
        UserError: openSMILE is not installed, or a clip cannot be decoded, or has changed since the corpus was read.
    """
    try:
        import opensmile
    except ImportError:
        raise UserError(
            "The classical reference row needs openSMILE (for research use only), which is not installed: run "
            "`make opensmile`, or set tables.baseline: none."
        ) from None
    smile = opensmile.Smile(
        feature_set=opensmile.FeatureSet.eGeMAPSv02,
        feature_level=opensmile.FeatureLevel.Functionals,
        num_workers=1,
    )
    table, _ = UTTERANCES.read(utterances, columns=["id", "path", "n_samples"])
    values, meter = [], Meter("clip", len(table))
    for row in range(len(table)):
        samples = recording(audio_root, table, row)
        values.append(smile.process_signal(samples, SAMPLE_RATE).to_numpy(np.float32)[0])
        meter.advance(audio=len(samples) / SAMPLE_RATE)
    FUNCTIONALS.write(
        output,
        pa.table({"id": table["id"], "values": pa.array(values, FUNCTIONALS.schema.field("values").type)}),
        features=f"openSMILE {opensmile.__version__} eGeMAPSv02 functionals",
    )
