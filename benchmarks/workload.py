"""What the benchmarks work on: clips as long as IEMOCAP's, HuBERT base with random weights, frames in clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

MEDIAN_SECONDS, MEAN_SECONDS = 3.6, 4.55
SHORTEST, LONGEST = 0.6, 34.0
"""Of IEMOCAP's utterances."""
LAYERS = [-1, -2, -3, -4, -5, -6, -7, -8]
"""Of Table 4."""
DIMENSIONS = 768
"""Of HuBERT base's hidden states."""


def bfloat16_by() -> str:
    """What the CPU multiplies bfloat16 with natively, AMX or AVX-512; empty where it does not."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    return next((name for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512")) if flag in flags), "")


def precisions() -> list[str]:
    """float32, and bfloat16 where the CPU multiplies it natively: elsewhere nobody would compute in it."""
    return ["bfloat16", "float32"] if bfloat16_by() else ["float32"]


def clip_seconds(total: float, seed: int = 0) -> np.ndarray:
    """Lengths of clips, log-normal with IEMOCAP's median and mean, that last `total` seconds or little more."""
    sigma = np.sqrt(2 * np.log(MEAN_SECONDS / MEDIAN_SECONDS))
    random = np.random.default_rng(seed)
    drawn = np.clip(MEDIAN_SECONDS * np.exp(sigma * random.standard_normal(100_000)), SHORTEST, LONGEST)
    return drawn[: 1 + int(np.searchsorted(np.cumsum(drawn), total))]


def clustered(n_frames: int, random: np.random.Generator, n_centres: int = 5000) -> np.ndarray:
    """Frames around common centres, (n_frames, DIMENSIONS) in float32: more clusters than any codebook has centroids.

    A centre is itself near one of 40 others, as sounds are near phones; half of the variance is within clusters.
    """
    of_centres = np.random.default_rng(0)
    phones = of_centres.normal(size=(40, DIMENSIONS))
    centres = 0.5 * phones[of_centres.integers(0, 40, n_centres)] + 0.5 * of_centres.normal(
        size=(n_centres, DIMENSIONS)
    )
    noise = random.standard_normal((n_frames, DIMENSIONS), np.float32)
    return centres.astype(np.float32)[random.integers(0, n_centres, n_frames)] + 0.7 * noise


def hidden_states(paths: list[Path], last: int, precision: str = "float32") -> dict[int, np.ndarray]:
    """Of recordings, in the last layers of this package's HuBERT: frames, one clip after another, in float32."""
    import torch

    from gmp_atl import audio, model_files
    from gmp_atl.clips import Clips, local_features, passes
    from gmp_atl.config import PACKAGED_ENCODER

    encoder = model_files.load(PACKAGED_ENCODER)[0].eval()
    encoder.cast(getattr(torch, precision))
    layers = range(-1, -1 - last, -1)
    found = {layer: [np.empty(0)] * len(paths) for layer in layers}
    with torch.inference_mode():
        waves = [audio.load(path) for path in paths]
        clips = Clips([path.stem for path in paths], local_features(encoder, waves, paths, normalise=False))
        for batch in passes(clips, 320.0, torch.device("cpu")):
            for layer, hidden in encoder.hidden_states(batch.local, batch.lengths, layers).items():
                lengths = batch.lengths.tolist()
                for row, index, length in zip(hidden.float().numpy(), batch.indices, lengths, strict=True):
                    found[layer][index] = row[:length]
    return {layer: np.concatenate(of_clips) for layer, of_clips in found.items()}


def speech(folder: Path) -> np.ndarray:
    """Frames of the recordings in a folder, (frames, DIMENSIONS) in float16.

    They are as wide as HuBERT base's: four layers of this package's, of 192 dimensions each, side by side.
    """
    from gmp_atl import recordings

    states = hidden_states(recordings.find([folder]), last=DIMENSIONS // 192)
    return np.concatenate([of_layer.astype(np.float16) for of_layer in states.values()], axis=1)


def write_corpus(folder: Path, total: float) -> None:
    """WAV files of noise and their utterance table, a fifth of them in each of IEMOCAP's sessions."""
    import pyarrow as pa
    import soundfile

    from gmp_atl.formats import UTTERANCES

    random = np.random.default_rng(1)
    rows = []
    (folder / "audio").mkdir(parents=True)
    for number, seconds in enumerate(clip_seconds(total)):
        samples = random.normal(0, 0.1, round(seconds * 16_000))
        path = f"{number:05d}.wav"
        soundfile.write(folder / "audio" / path, samples, 16_000, subtype="PCM_16")
        session, emotion = f"Ses0{number % 5 + 1}", ("angry", "happy", "neutral", "sad")[number // 5 % 4]
        rows.append(
            {"id": f"clip{number:05d}", "path": path, "speaker": session, "gender": "female", "session": session}
            | {"emotion": emotion, "n_samples": len(samples), "text_type": "", "sha256": ""}
        )
    table = pa.Table.from_pylist(rows, schema=UTTERANCES.schema)
    UTTERANCES.write(folder / "utterances.parquet", table, corpus="noise", complete=True, audio="noise")


def write_encoder(folder: Path, **changes: Any) -> None:
    """HuBERT base, with changes of its sizes; weights as transformers draws them, in `folder/encoder`."""
    import torch
    from transformers import HubertConfig, HubertModel

    from gmp_atl import model_files

    torch.manual_seed(0)
    HubertModel(HubertConfig(**changes)).save_pretrained(folder / "transformers")
    encoder, _ = model_files.load(folder / "transformers")
    model_files.save(encoder, folder / "encoder", encoder="random", fitted_on=[])


def setting(stage: str, precision: str = "auto", fit_on: str = "training") -> Any:
    """What `stage` reads of the paper's config, with these changes."""
    from gmp_atl import config as configs

    settings = yaml.safe_load((Path(__file__).parent.parent / "config.yaml").read_text(encoding="utf-8"))
    settings["compute"]["precision"], settings["clustering"]["fit_on"] = precision, fit_on
    return configs.SLICES[stage].model_validate(configs.slice_for(configs.parse(settings), stage))


def convolve(folder: Path, precision: str = "auto", gpus: int = 0) -> None:
    """The stage `local_features`, on what `write_corpus` and `write_encoder` have put into the folder."""
    from gmp_atl.stages.local_features import local_features

    local_features(
        config=setting("local_features", precision),
        utterances=folder / "utterances.parquet",
        audio_root=folder / "audio",
        encoder=folder / "encoder",
        output=folder / "local_features.parquet",
        gpus=gpus,
    )


def seconds(folder: Path) -> float:
    """Of audio in the corpus."""
    from gmp_atl.formats import UTTERANCES

    table, _ = UTTERANCES.read(folder / "utterances.parquet", columns=["n_samples"])
    return sum(table["n_samples"].to_pylist()) / 16_000
