"""The one training loop of every stage that trains.

A stage supplies a model, the clips and an objective; the loop supplies length-bucketed batches under a
budget of seconds, gradient accumulation to the effective batch, Adam with its schedule, clipping, the guard
against divergence, history, progress, and checkpoints. Every random draw depends on (seed, fold, stage,
update) alone, so a run that was killed ends with the weights of one that was not.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.optim.adam import adam

from gmp_atl import devices
from gmp_atl.clips import Batch, Clips, collate, epoch_batches, random_crops, within_budget
from gmp_atl.code import code_hash
from gmp_atl.config import ComputeConfig, OptimisationConfig
from gmp_atl.encoder import Encoder, Regularisation
from gmp_atl.errors import UserError
from gmp_atl.files import remove_partial
from gmp_atl.formats import HISTORY, content_digest
from gmp_atl.frames import FRAME_SECONDS
from gmp_atl.graphs import LayerGraphs
from gmp_atl.model_files import load_tensors, save_tensors
from gmp_atl.progress import PROGRESS_SECONDS, clock
from gmp_atl.randomness import Key

log = logging.getLogger(__name__)

CHECKPOINT_MINUTES = float(os.environ.get("GMP_ATL_CHECKPOINT_MINUTES", "10"))
"""compute.checkpoint_minutes; it comes by the environment because it must not count as a change of the job."""


@dataclass(frozen=True)
class Terms:
    """What an objective makes of one batch: sums, so that batches can be accumulated exactly."""

    loss: Tensor
    """Sum over the items of the loss (clips, or masked frames)."""
    count: int
    """Items in that sum."""
    quantities: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    """Further sums and their counts, for the history: accuracies, parts of the loss."""

    def figures(self) -> Terms:
        """The same without the autograd graph."""
        quantities = {name: (total.detach(), count) for name, (total, count) in self.quantities.items()}
        return Terms(self.loss.detach(), self.count, quantities)


Objective = Callable[[Batch, torch.Generator], Terms]
Validation = Callable[[], dict[str, float]]
"""Figures of the model as it is; the first decides which epoch is kept, higher being better."""


@dataclass
class Progress:
    """Everything that a checkpoint holds beside weights and optimiser."""

    update: int = 0
    history: list[tuple[int, str, float]] = field(default_factory=list)
    best_score: float = -math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Moments:
    """Adam's state of one parameter (Kingma and Ba 2015, Algorithm 1)."""

    step: Tensor
    """Updates so far, ()."""
    exp_avg: Tensor
    """Running mean of the gradient, in the parameter's shape."""
    exp_avg_sq: Tensor
    """Running mean of its square."""

    @classmethod
    def of(cls, parameter: Tensor) -> Moments:
        """Before the first update."""
        return cls(torch.zeros((), device=parameter.device), torch.zeros_like(parameter), torch.zeros_like(parameter))


@dataclass(frozen=True)
class Unsettled:
    """An update whose figures a GPU may still compute, while the next is prepared."""

    update: int
    names: list[str]
    values: Callable[[], list[float]]
    """Of the quantities named; asking waits for them."""
    failed: Tensor
    """One if loss or gradient are not finite, else zero, ()."""
    rate: float
    ids: list[str]
    """Of its utterances."""


def regularisation(config: OptimisationConfig) -> Regularisation:
    """The encoder's random perturbations that a stage asks for."""
    return Regularisation(config.dropout, config.attention_dropout, config.layerdrop)


def learning_rate(config: OptimisationConfig, update: int, updates: int) -> float:
    """Of update `update` (from 0): linear warm-up, then constant or linear decay to zero."""
    warmup = round(config.warmup * updates)
    if update < warmup:
        return config.learning_rate * (update + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (updates - update) / (updates - warmup)


def fingerprint(stage: str, config: BaseModel, key: Key, inputs: Sequence[Path]) -> str:
    """What a checkpoint must match to be resumed: settings, run, code, and the content of input files."""
    parts = [stage, config.model_dump_json(), repr(key), code_hash(stage), *map(content_digest, inputs)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def updates_per_epoch(clips: Clips, config: OptimisationConfig) -> int:
    """Batches that all clips make."""
    return math.ceil(len(clips.ids) / config.batch_size)


class Trainer:
    """Trains `model` on `clips`; weights end in `model`, the history in `finish`."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        clips: Clips,
        *,
        config: OptimisationConfig,
        compute: ComputeConfig,
        key: Key,
        device: torch.device,
        checkpoint: Path,
        fingerprint: str,
        updates: int,
        validate: Validation | None = None,
        after: Mapping[int, Callable[[], None]] | None = None,
    ) -> None:
        """The caller says for how long to train, and which fingerprint a checkpoint must match.

        Args:
            fingerprint: ties the checkpoint to its inputs and code.
            validate: figures that decide which epoch's weights are kept.
            after: what is to be done after so many updates.
        """
        self.after = after or {}
        self.model, self.objective, self.clips, self.validate = model.to(device), objective, clips.to(device), validate
        self.config, self.compute, self.key, self.device = config, compute, key, device
        self.checkpoint, self.fingerprint = checkpoint, fingerprint
        self.precision = devices.dtype(compute.precision, device)
        self.updates, self.updates_per_epoch = updates, updates_per_epoch(clips, config)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.moments = {name: Moments.of(parameter) for name, parameter in self.parameters.items()}
        self._rounded = self._to_round()
        self._graphs = self._to_replay()
        kept = {parameter: part for graphs in self._graphs for parameter, part in graphs.gradients.items()}
        self._kept = {name: kept[parameter] for name, parameter in self.parameters.items() if parameter in kept}
        """Gradients that are added up in the same place at every update."""
        self.progress = Progress()
        self._unsettled: Unsettled | None = None
        self._order: tuple[int, list[list[int]]] = (-1, [])

    def run(self) -> None:
        """Train to the end, from the checkpoint if there is one.

        Raises:
            UserError: the loss or the gradient is no longer finite.
            SystemExit: SIGTERM or SIGINT came; the checkpoint holds everything up to the last update.
        """
        self._resume()
        self.model.train()
        started, first = time.monotonic(), self.progress.update
        saved = reported = started
        seconds = 0.0
        with _signals_as_flag() as flag:
            while self.progress.update < self.updates:
                seconds += self._update()
                now, stop = time.monotonic(), flag.received  # read once: what is stopped has been saved
                if stop or now - saved >= 60 * CHECKPOINT_MINUTES:
                    self._save()
                    saved = now
                if stop:
                    log.warning("%s: stopped by %s after update %d", self.key.stage, stop.name, self.progress.update)
                    raise SystemExit(128 + stop)
                if now - reported >= PROGRESS_SECONDS:
                    reported = now
                    self._report(seconds / (now - started), (now - started) / (self.progress.update - first))
        self._settle()
        if self.progress.best_weights:
            self.model.load_state_dict(self.progress.best_weights, strict=False)
        self.model.eval()

    def finish(self, history: Path) -> None:
        """Write every quantity at every update, as a HISTORY file, and let the checkpoint go."""
        updates, quantities, values = zip(*self.progress.history, strict=True)
        epochs = [update / self.updates_per_epoch for update in updates]
        columns = {"update": updates, "epoch": epochs, "quantity": quantities, "value": values}
        HISTORY.write(history, pa.table(columns, schema=HISTORY.schema), stage=self.key.stage)
        self.checkpoint.unlink(missing_ok=True)
        remove_partial(self.checkpoint)

    def _update(self) -> float:
        """One optimiser step; returns the seconds of audio in it."""
        update = self.progress.update
        # Dropout draws from torch's global generators; seeding them here makes an update repeatable on its own.
        torch.manual_seed(self.key.derive("dropout", update))
        generator = self.key.generator("objective", update)
        crops = random_crops(
            self.clips, self._indices(update), self.config.max_clip_seconds, self.key.generator("crop", update)
        )
        rate = learning_rate(self.config, update, self.updates)
        for parameter in self.parameters.values():
            parameter.grad = None
        parts: list[Terms] = []
        gradients = dict(self._kept)
        for graphs in self._graphs:
            graphs.total.zero_()
        with self._rounding():
            for members in within_budget(crops, self.compute.batch_seconds, self.device):
                batch = collate(self.clips, members)
                with devices.autocast(self.device, self.precision):
                    terms = self.objective(batch, generator)
                terms.loss.backward()  # type: ignore[no-untyped-call]
                self._add_up(gradients)
                parts.append(terms.figures())
                # Beside the autograd graph of another batch, LayerGraphs could not record: the parameters' nodes in it
                # would tie the recording to the stream that they were made on.
                del terms
        count = sum(part.count for part in parts)
        for name, parameter in self.parameters.items():
            parameter.grad = gradients.get(name)
        others = [gradient for name, gradient in gradients.items() if name not in self._kept]
        norm = nn.utils.get_total_norm([*others, *(graphs.total for graphs in self._graphs)]) / count
        self._settle()
        made = self._measure(parts, count, norm, rate, [self.clips.ids[crop.index] for crop in crops])
        self._step(rate, count * (norm / self.config.gradient_clip).clamp(min=1), made.failed)
        self._unsettled = made
        self.progress.update += 1
        if self.progress.update in self.after:
            self._settle()
            self.after[self.progress.update]()
        if self.validate and self.progress.update % self.updates_per_epoch == 0:
            self._keep_best(self.validate)
        return sum(crop.length for crop in crops) * FRAME_SECONDS

    def _to_round(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Parameters of the encoder's transformer, and copies to round them into; none in float32."""
        if self.precision is torch.float32:
            return []
        encoders = [module for module in self.model.modules() if isinstance(module, Encoder)]
        parameters = [parameter for encoder in encoders for parameter in encoder.of_transformer()]
        return [(each, torch.empty_like(each, dtype=self.precision, requires_grad=False)) for each in parameters]

    def _to_replay(self) -> list[LayerGraphs]:
        """Let layers whose clips are packed on a GPU be replayed."""
        graphs = []
        for encoder in (module for module in self.model.modules() if isinstance(module, Encoder)):
            trained = all(parameter.requires_grad for parameter in encoder.encoder.layers.parameters())
            same_layers = trained and not encoder.regularisation.layerdrop
            if same_layers and self.device.type == "cuda" and encoder.packs(self.device, self.precision):
                graphs.append(encoder.replay(self.device))
        return graphs

    @contextmanager
    def _rounding(self) -> Iterator[None]:
        """The encoder's weights rounded to bfloat16 within, where that is the precision: else each layer casts them."""
        trained = [parameter.data for parameter, _ in self._rounded]
        if trained:
            torch._foreach_copy_([rounded for _, rounded in self._rounded], trained)
        for parameter, rounded in self._rounded:
            parameter.data = rounded
        try:
            yield
        finally:
            for (parameter, _), weights in zip(self._rounded, trained, strict=True):
                parameter.data = weights

    def _add_up(self, gradients: dict[str, Tensor]) -> None:
        """Take the gradients of one backward pass out of the parameters, and add them to `gradients` in float32."""
        found = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        rounded = [name for name, gradient in found.items() if gradient.dtype is not torch.float32]
        if rounded:
            of_rounded = [found[name] for name in rounded]
            exact = [torch.empty_like(gradient, dtype=torch.float32) for gradient in of_rounded]
            torch._foreach_copy_(exact, of_rounded)
            found.update(zip(rounded, exact, strict=True))
        again = [name for name in found if name in gradients]
        if again:
            torch._foreach_add_([gradients[name] for name in again], [found[name] for name in again])
        gradients.update({name: gradient for name, gradient in found.items() if name not in gradients})
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def _step(self, rate: float, divisor: Tensor, failed: Tensor) -> None:
        """Adam, by the gradients over `divisor`, unless the update has failed: then nothing changes.

        Its class, torch.optim.Adam, would import torch's compiler, which every short job would wait for.
        """
        with_gradient = [(p, p.grad, self.moments[name]) for name, p in self.parameters.items() if p.grad is not None]
        parameters, gradients, moments = map(list, zip(*with_gradient, strict=True))
        adam(
            parameters,
            gradients,
            [each.exp_avg for each in moments],
            [each.exp_avg_sq for each in moments],
            [],
            [each.step for each in moments],
            fused=True,
            grad_scale=divisor,
            found_inf=failed,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    def _indices(self, update: int) -> list[int]:
        epoch, position = divmod(update, self.updates_per_epoch)
        if self._order[0] != epoch:
            generator = self.key.generator("order", epoch)
            self._order = (epoch, epoch_batches(self.clips.lengths, self.config.batch_size, generator))
        return self._order[1][position]

    def _measure(self, parts: list[Terms], count: int, norm: Tensor, rate: float, ids: list[str]) -> Unsettled:
        """The figures of this update for the history, without waiting for a GPU that still computes them."""
        sums: dict[str, Tensor] = {"loss": torch.stack([part.loss for part in parts]).sum() / count}
        for name in parts[0].quantities:
            total = torch.stack([part.quantities[name][0].detach().float() for part in parts]).sum()
            sums[name] = total / max(1, sum(part.quantities[name][1] for part in parts))
        sums["gradient_norm"] = norm
        failed = ~torch.isfinite(torch.stack([sums["loss"], norm])).all()
        values = devices.fetch(torch.stack(list(sums.values())))
        return Unsettled(self.progress.update, list(sums), values, failed.float(), rate, ids)

    def _settle(self) -> None:
        """Put the last update into the history.

        Raises:
            UserError: its loss or gradient is not finite. It has not changed the weights.
        """
        made, self._unsettled = self._unsettled, None
        if made is None:
            return
        found = dict(zip(made.names, made.values(), strict=True))
        if not math.isfinite(found["loss"] + found["gradient_norm"]):
            self.progress.update = made.update
            self._diverged(found["loss"], found["gradient_norm"], made.ids)
        found["learning_rate"] = made.rate
        self.progress.history += [(made.update, name, value) for name, value in found.items()]

    def _diverged(self, loss: float, norm: float, ids: list[str]) -> None:
        self._save()
        raise UserError(
            f"{self.key.stage}, fold {self.key.fold}, seed {self.key.seed}: update {self.progress.update} has loss "
            f"{loss} and gradient norm {norm}. Its utterances: {', '.join(ids)}. The weights before it are kept in "
            f"{self.checkpoint}; lower the stage's learning_rate, or set compute.precision: float32."
        )

    def _keep_best(self, validate: Validation) -> None:
        self._settle()
        self.model.eval()
        figures = validate()
        self.model.train()
        self.progress.history += [(self.progress.update - 1, f"validation_{n}", v) for n, v in figures.items()]
        score = next(iter(figures.values()))
        if score > self.progress.best_score:
            self.progress.best_score = score
            weights = self.model.state_dict()
            self.progress.best_weights = {name: weights[name].detach().cpu().clone() for name in self.parameters}

    def _report(self, rate: float, seconds_per_update: float) -> None:
        self._settle()
        loss = next(v for _, name, v in reversed(self.progress.history) if name == "loss")
        left = (self.updates - self.progress.update) * seconds_per_update
        log.info(
            "%s fold %d seed %d: update %d of %d, loss %.3f, %.0f s of audio per second, %s left",
            *(self.key.stage, self.key.fold, self.key.seed, self.progress.update, self.updates, loss, rate),
            clock(left),
        )

    def _save(self) -> None:
        self._settle()
        progress = self.progress
        names = sorted({name for _, name, _ in progress.history})
        rows = [[update, names.index(name), value] for update, name, value in progress.history]
        tensors = {f"model.{name}": p.detach().cpu() for name, p in self.parameters.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in progress.best_weights.items()}
        tensors["history"] = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
        for name in self.parameters:
            for slot, tensor in vars(self.moments[name]).items():
                tensors[f"adam.{slot}.{name}"] = tensor.cpu()
        best = progress.best_score if progress.best_weights else None
        save_tensors(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            self.checkpoint,
            fingerprint=self.fingerprint,
            update=progress.update,
            names=names,
            best_score=best,
        )

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        try:
            tensors, metadata = load_tensors(self.checkpoint)
        except UserError as error:
            log.warning("%s Training starts from the beginning.", error)
            return
        if metadata.get("fingerprint") != self.fingerprint:
            log.warning("%s is of other inputs, settings or code: training starts from the beginning", self.checkpoint)
            return
        self._restore(tensors, metadata)
        log.info("%s goes on from update %d of %d", self.key.stage, self.progress.update, self.updates)

    def _restore(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
                for slot, tensor in vars(self.moments[name]).items():
                    tensor.copy_(tensors[f"adam.{slot}.{name}"])
        self.progress = Progress(
            metadata["update"],
            [(int(update), metadata["names"][int(name)], value) for update, name, value in tensors["history"].tolist()],
            -math.inf if metadata["best_score"] is None else metadata["best_score"],
            {name.removeprefix("best."): t for name, t in tensors.items() if name.startswith("best.")},
        )


@dataclass
class _Flag:
    received: signal.Signals | None = None


@contextmanager
def _signals_as_flag() -> Iterator[_Flag]:
    """Within the block SIGTERM and SIGINT only raise a flag, so that an update is never cut in half.

    SIGTERM comes from a cluster's scheduler; Ctrl-C on Snakemake sends SIGINT to its jobs too.
    """
    flag = _Flag()

    def note(number: int, _: object) -> None:
        flag.received = signal.Signals(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
