"""Updates of retraining and fine-tuning, and an evaluation, against the way that the published code of others does it.

    python benchmarks/training.py [WORD ...]    # only work with these words in its name, such as evaluation

The peer's way, written anew: random batches of waveforms, padded to the longest (10 s at most); the convolutions run in
every step, without gradients; float32; transformers' HuBERT and its mask function; in retraining, HuBERT's cosine head
with the codeword of every class repeated for every frame; in evaluation, one clip at a time. Both sides take the same
number of clips per update, fewer than the paper's 64: the peer's way would need more than 24 GB for those, and minutes
per update. Few clips favour neither: what an update costs whatever its clips, Adam, is about the same on both sides.
Ours runs on cached local features, as in the workflow. Codebooks, labels, audio and weights are random.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import sides
import workload

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SECONDS = 180.0
"""Of audio in the corpus."""


@dataclass(frozen=True)
class Amount:
    """How much is done, and where."""

    clips: int
    """Per update."""
    updates: int
    """Timed at once."""
    device: str = "cpu"


RETRAINING, FINETUNING = Amount(clips=2, updates=1), Amount(clips=8, updates=1)
SIZES = (64, 512, 4096)
CROP = 10.0
CLASSES = 4


def prepare(folder: Path) -> None:
    """Audio, weights and local features in both precisions."""
    workload.write_corpus(folder, SECONDS)
    workload.write_encoder(folder)
    workload.convolve(folder)


# The peer's way.


class Peer:
    """transformers' HuBERT with a head, on waveforms."""

    def __init__(self, folder: Path, head: torch.nn.Module, device: str) -> None:
        import soundfile
        import torch
        from transformers import HubertModel

        self.waves = [soundfile.read(path, dtype="float32")[0] for path in sorted((folder / "audio").iterdir())]
        self.device = torch.device(device)
        self.model = HubertModel.from_pretrained(folder / "transformers").to(self.device)  # type: ignore[arg-type]
        self.model.feature_extractor._freeze_parameters()  # without it, gradients of the waveforms are computed
        self.head = head.to(self.device)
        self.parameters = [p for p in [*self.model.parameters(), *head.parameters()] if p.requires_grad]
        self.optimiser = torch.optim.Adam(self.parameters, lr=1e-4)
        self.random = np.random.default_rng(0)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Waveforms, padded, and the samples of each, on the CPU; without end."""
        import torch

        longest = round(CROP * 16_000)
        while True:
            chosen = [self.waves[n][:longest] for n in self.random.choice(len(self.waves), size, replace=False)]
            samples = torch.tensor([len(wave) for wave in chosen])
            padded = torch.zeros(size, int(samples.max()))
            for row, wave in zip(padded, chosen, strict=True):
                row[: len(wave)] = torch.from_numpy(wave)
            yield padded, samples

    def hidden(self, padded: Tensor, samples: Tensor, mask: Tensor | None) -> Tensor:
        """Last layer: (batch, frames, 768)."""
        import torch

        valid = (torch.arange(padded.shape[1]) < samples[:, None]).long().to(self.device)
        return self.model(padded.to(self.device), attention_mask=valid, mask_time_indices=mask).last_hidden_state

    def update(self, loss: Tensor) -> None:
        """One step of Adam."""
        import torch

        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()


def peer_retraining(amount: Amount) -> sides.Side:
    """Masked prediction with repeated codewords."""

    def side(folder: Path) -> sides.Work:
        import torch
        from torch import nn
        from torch.nn import functional as F
        from transformers.models.hubert.modeling_hubert import _compute_mask_indices

        from gmp_atl.frames import n_frames

        heads = nn.ModuleList(nn.Linear(workload.DIMENSIONS, 256) for _ in SIZES)
        codebooks = nn.ParameterList(torch.randn(size, 256) for size in SIZES)
        peer = Peer(folder, nn.ModuleList([heads, codebooks]), amount.device)
        peer.model.train()
        batches = peer.batches(amount.clips)

        def step() -> float:
            padded, samples = next(batches)
            lengths = torch.tensor([n_frames(int(count)) for count in samples])
            shape = (len(samples), int(lengths.max()))
            valid = torch.arange(shape[1]) < lengths[:, None]
            drawn = _compute_mask_indices(shape, 0.8, 10, valid.long(), min_masks=1)  # type: ignore[arg-type]
            mask = torch.from_numpy(drawn).to(peer.device)
            masked = peer.hidden(padded, samples, mask)[mask & valid.to(peer.device)]
            loss = torch.zeros((), device=peer.device)
            for head, codewords, size in zip(heads, codebooks, SIZES, strict=True):
                targets = torch.randint(size, (len(masked),), device=peer.device)
                repeated = codewords[:, None].expand(-1, len(masked), -1).contiguous()
                logits = F.cosine_similarity(head(masked)[None], repeated, dim=-1).T / 0.1
                loss = loss + F.cross_entropy(logits, targets, reduction="sum")
            peer.update(loss / max(1, len(masked)))
            return float(samples.sum()) / 16_000

        return lambda: sum(step() for _ in range(amount.updates))

    return side


def utterance_head() -> torch.nn.Module:
    """The same on both sides."""
    from gmp_atl.heads import UtteranceHead

    return UtteranceHead(workload.DIMENSIONS, workload.setting("finetuning").head, {"emotion": CLASSES})


def peer_finetuning(amount: Amount) -> sides.Side:
    """Cross-entropy on whole clips."""

    def side(folder: Path) -> sides.Work:
        import torch
        from torch.nn import functional as F

        from gmp_atl.frames import n_frames

        peer = Peer(folder, utterance_head(), amount.device)
        peer.model.train()
        batches = peer.batches(amount.clips)

        def step() -> float:
            padded, samples = next(batches)
            lengths = torch.tensor([n_frames(int(count)) for count in samples])
            logits = peer.head(peer.hidden(padded, samples, None), lengths)["emotion"]
            peer.update(F.cross_entropy(logits, torch.randint(CLASSES, (len(samples),), device=peer.device)))
            return float(samples.sum()) / 16_000

        return lambda: sum(step() for _ in range(amount.updates))

    return side


def peer_evaluation(device: str) -> sides.Side:
    """One clip at a time, convolutions included."""

    def side(folder: Path) -> sides.Work:
        import torch

        from gmp_atl.frames import n_frames

        peer = Peer(folder, utterance_head(), device)
        peer.model.train(mode=False)

        @torch.no_grad()
        def work() -> float:
            for wave in peer.waves:
                hidden = peer.model(torch.from_numpy(wave)[None].to(peer.device)).last_hidden_state
                peer.head(hidden, torch.tensor([n_frames(len(wave))]))["emotion"].softmax(1).cpu()
            return sum(map(len, peer.waves)) / 16_000

        return work

    return side


# Ours.


def clips(folder: Path) -> Any:
    """Local features of the whole corpus."""
    from gmp_atl.clips import Clips
    from gmp_atl.folds import everything

    return Clips.read(folder / "local_features.parquet", everything(folder / "utterances.parquet"), encoder="random")


def trainer(folder: Path, model: torch.nn.Module, objective: Any, precision: str, amount: Amount) -> sides.Work:
    """Updates of the workflow's training loop."""
    import torch

    from gmp_atl.config import OptimisationConfig
    from gmp_atl.randomness import Key
    from gmp_atl.training import Trainer

    made = Trainer(
        model,
        objective,
        clips(folder),
        config=OptimisationConfig(batch_size=amount.clips, max_clip_seconds=CROP),
        compute=workload.setting("finetuning", precision).compute,
        key=Key(0, 1, "benchmark"),
        device=torch.device(amount.device),
        checkpoint=folder / "checkpoint.safetensors",
        fingerprint="benchmark",
        updates=1000,
    )
    model.train()
    return lambda: sum(made._update() for _ in range(amount.updates))


def retraining(precision: str, amount: Amount) -> sides.Side:
    """Stage 3."""

    def side(folder: Path) -> sides.Work:
        import torch

        from gmp_atl import model_files
        from gmp_atl.encoder import Regularisation
        from gmp_atl.masked_prediction import MaskedPredictor, masked_prediction
        from gmp_atl.masking import span_mask

        settings = workload.setting("retraining").retraining
        encoder, _ = model_files.load(folder / "encoder", Regularisation(0.1, 0.1))
        model = MaskedPredictor(encoder, settings.projection, list(SIZES), settings.codebook_head)
        labels = {
            size: torch.randint(size, (int(clips(folder).lengths.sum()),), device=amount.device) for size in SIZES
        }

        def objective(batch: Any, generator: torch.Generator) -> Any:
            mask = span_mask(batch.lengths, settings.mask.probability, settings.mask.length, generator)
            targets = {size: of_frames[batch.rows] for size, of_frames in labels.items()}
            return masked_prediction(model, batch.local, batch.lengths, mask, targets, 0.0)

        return trainer(folder, model, objective, precision, amount)

    return side


def finetuning(precision: str, amount: Amount) -> sides.Side:
    """Stage 4, with cross-entropy."""

    def side(folder: Path) -> sides.Work:
        import torch
        from torch.nn import functional as F

        from gmp_atl import model_files
        from gmp_atl.classifier import Classifier
        from gmp_atl.encoder import Regularisation
        from gmp_atl.training import Terms

        encoder, _ = model_files.load(folder / "encoder", Regularisation(0.1, 0.1))
        model = Classifier(encoder, workload.setting("finetuning").head, {"emotion": CLASSES})

        def objective(batch: Any, _: torch.Generator) -> Terms:
            count = len(batch.indices)
            emotion = torch.randint(CLASSES, (count,), device=amount.device)
            return Terms(F.cross_entropy(model(batch)["emotion"], emotion, reduction="sum"), count)

        return trainer(folder, model, objective, precision, amount)

    return side


def evaluation(precision: str, device: str) -> sides.Side:
    """Stage 5."""

    def side(folder: Path) -> sides.Work:
        import torch

        from gmp_atl import classifier, devices, model_files

        compute, where = workload.setting("evaluation", precision).compute, torch.device(device)
        encoder, _ = model_files.load(folder / "encoder")
        model = classifier.Classifier(encoder, workload.setting("evaluation").head, {"emotion": CLASSES}).eval()
        model.encoder.cast(devices.dtype(precision, where))
        model.to(where)

        def work() -> float:
            classifier.apply(model, clips(folder), "emotion", compute, where)
            return workload.seconds(folder)

        return work

    return side


SIDES = {
    "retraining, peer": peer_retraining(RETRAINING),
    "retraining, float32": retraining("float32", RETRAINING),
    "retraining, bfloat16": retraining("bfloat16", RETRAINING),
    "fine-tuning, peer": peer_finetuning(FINETUNING),
    "fine-tuning, float32": finetuning("float32", FINETUNING),
    "fine-tuning, bfloat16": finetuning("bfloat16", FINETUNING),
    "evaluation, peer": peer_evaluation("cpu"),
    "evaluation, float32": evaluation("float32", "cpu"),
    "evaluation, bfloat16": evaluation("bfloat16", "cpu"),
}
COMPARISONS = [
    sides.Comparison(f"{work}, {precision}", f"{work}, {precision}", f"{work}, peer", goal)
    for work, goal in (("retraining", 3), ("fine-tuning", 2.5), ("evaluation", 2))
    for precision in workload.precisions()
]

if __name__ == "__main__":
    sides.main(__file__, "Seconds of audio", SIDES, sides.asked(COMPARISONS), prepare)
