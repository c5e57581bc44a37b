"""The training loop: exact accumulation, and runs that end the same however often they were stopped."""

from __future__ import annotations

import copy
import logging
import math
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from gmp_atl import files, training
from gmp_atl.clips import Batch, Clips
from gmp_atl.config import ComputeConfig, OptimisationConfig
from gmp_atl.encoder import Encoder
from gmp_atl.errors import UserError
from gmp_atl.formats import HISTORY
from gmp_atl.model_files import load_tensors
from gmp_atl.randomness import Key
from gmp_atl.training import Terms, Trainer, learning_rate

N_CLIPS, CLASSES, BATCH = 22, 3, 8
UPDATES_PER_EPOCH = 3  # of 8, 8 and 6 clips
LABELS = torch.arange(N_CLIPS) % CLASSES


class Model(nn.Module):
    """Small, with dropout, and with one part that is frozen and one that the loss does not reach."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.frozen = nn.Linear(5, 7, bias=False).requires_grad_(False)
        self.linear, self.output, self.unused = nn.Linear(7, 9), nn.Linear(9, CLASSES), nn.Linear(2, 2)
        self.dropout = dropout

    def forward(self, batch: Batch) -> Tensor:
        pooled = self.frozen(batch.local).sum(dim=1) / batch.lengths[:, None]
        return self.output(F.dropout(self.linear(pooled).tanh(), self.dropout, self.training))


@dataclass
class Run:
    """One training; `before` is called with the number of the update before each call of the objective."""

    folder: Path
    before: Callable[[int], Any] = lambda update: None
    dropout: float = 0.0
    seed: int = 0
    epochs: int = 3
    fingerprint: str = "of this run"
    batch_seconds: float = 1e9
    validate: Callable[[Run], float] | None = None
    optimisation: dict[str, Any] = field(default_factory=dict)
    calls: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = Model(self.dropout)
        random = np.random.default_rng(0)
        lengths = random.integers(4, 40, N_CLIPS)
        clips = Clips(
            [f"clip{number}" for number in range(N_CLIPS)],
            [
                (random.normal(size=(length, 5)) + np.eye(5)[label]).astype(np.float16)
                for length, label in zip(lengths, LABELS, strict=True)
            ],
        )
        defaults = {"batch_size": BATCH, "learning_rate": 0.01, "max_clip_seconds": 0.5}
        optimisation = OptimisationConfig(**{**defaults, **self.optimisation})
        self.trainer = Trainer(
            self.model,
            self.objective,
            clips,
            config=optimisation,
            compute=ComputeConfig(precision="float32", batch_seconds=self.batch_seconds),
            key=Key(self.seed, 1, "stage"),
            device=torch.device("cpu"),
            checkpoint=self.checkpoint,
            fingerprint=self.fingerprint,
            updates=self.epochs * training.updates_per_epoch(clips, optimisation),
            validate=self.validate and (lambda: {"uar": self.validate(self), "war": 0.0}),
        )

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    @property
    def update(self) -> int:
        """Updates that are done."""
        return self.trainer.progress.update

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def objective(self, batch: Batch, generator: torch.Generator) -> Terms:
        self.calls += 1
        self.before(self.update)
        noise = torch.rand(len(batch.indices), 1, generator=generator)  # stands for masks
        logits, labels = self.model(batch) + 0.1 * noise, LABELS[batch.indices]
        correct = (logits.argmax(1) == labels).sum()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return Terms(loss, len(labels), {"accuracy": (correct, len(labels))})

    def finished(self) -> Run:
        self.trainer.run()
        return self

    def history(self) -> list[dict[str, Any]]:
        path = self.folder / "history.parquet"
        self.trainer.finish(path)
        return HISTORY.read(path)[0].to_pylist()


@pytest.fixture
def run(tmp_path) -> Callable[..., Run]:
    """Builds runs in one folder, so that each finds the checkpoint of the one before; `apart` in another."""

    def build(*, apart: str = "shared", **settings: Any) -> Run:
        (tmp_path / apart).mkdir(exist_ok=True)
        return Run(tmp_path / apart, **settings)

    return build


def test_no_batch_of_an_update_keeps_the_autograd_graph_of_one_before(run):
    """Beside one, CUDA graphs could not be recorded: nodes of the parameters would tie them to the stream of that."""
    one, met = run(batch_seconds=1e-6), []
    plain, weight = one.trainer.objective, one.model.linear.weight

    def watched(batch: Batch, generator: torch.Generator) -> Terms:
        node = torch.autograd.graph.get_gradient_edge(weight).node  # the graph's, as long as one lives
        met.append("met" in node.metadata)
        node.metadata["met"] = True
        terms = plain(batch, generator)
        return replace(terms, quantities={"loss": (terms.loss, terms.count)})

    one.trainer.objective = watched
    one.trainer._update()
    assert met == [False] * BATCH


@pytest.fixture
def checkpoint_always(monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_MINUTES", 0.0)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """To the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def stop_at(update: int, act: Callable[[], Any]) -> Callable[[int], None]:
    """Acts in the first call of the objective in that update."""
    seen = []

    def before(current: int) -> None:
        if current == update and not seen:
            seen.append(current)
            act()

    return before


class Killed(BaseException):
    """Stands for a power cut: nothing is saved after it."""


def kill() -> None:
    raise Killed


# What an update is.


@pytest.mark.parametrize("clip", [1.0, 1e-3])
def test_clips_one_by_one_make_the_same_update_as_one_batch(run, clip):
    """Even where the gradient is clipped: that happens to the whole, not to the parts."""
    optimisation = {"gradient_clip": clip}
    together = run(apart="together", optimisation=optimisation).finished()
    alone = run(apart="alone", optimisation=optimisation, batch_seconds=1e-6).finished()
    assert (together.calls, alone.calls) == (3 * UPDATES_PER_EPOCH, 3 * N_CLIPS)
    for name, expected in together.weights.items():
        torch.testing.assert_close(alone.weights[name], expected, atol=1e-5, rtol=1e-4)
    for one, other in zip(alone.history(), together.history(), strict=True):
        assert one == {**other, "value": pytest.approx(other["value"], rel=1e-3, abs=1e-5)}


def test_an_update_is_adam_on_the_mean_loss_with_its_gradient_clipped(run):
    optimisation = {"batch_size": N_CLIPS, "gradient_clip": 0.05, "max_clip_seconds": 100.0}
    updates = 4  # the first is the same for any betas
    trained = run(optimisation=optimisation, epochs=updates)
    clips, reference = trained.trainer.clips, copy.deepcopy(trained.model)
    trained.finished()

    longest_first = sorted(range(N_CLIPS), key=lambda index: (clips.lengths[index], index), reverse=True)
    pooled = torch.stack([torch.from_numpy(clips.local[index]).float().mean(dim=0) for index in longest_first])
    optimiser = torch.optim.Adam(reference.parameters())
    for update in range(updates):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(trained.trainer.config, update, updates)
        noise = torch.rand(N_CLIPS, 1, generator=Key(0, 1, "stage").generator("objective", update))
        logits = reference.output(reference.linear(reference.frozen(pooled)).tanh()) + 0.1 * noise
        optimiser.zero_grad()
        F.cross_entropy(logits, LABELS[longest_first]).backward()
        assert nn.utils.clip_grad_norm_(reference.parameters(), 0.05) > 0.05
        optimiser.step()
    for name, expected in reference.state_dict().items():
        torch.testing.assert_close(trained.weights[name], expected, atol=1e-6, rtol=1e-5)


def test_what_is_frozen_or_not_reached_stays_as_it_was(run):
    trained = run()
    before = trained.weights
    after = trained.finished().weights
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"linear", "output"}
    assert not trained.model.training


def test_history_has_every_quantity_of_every_update(run):
    rows = run().finished().history()
    expected = {
        (update, quantity)
        for update in range(3 * UPDATES_PER_EPOCH)
        for quantity in ("loss", "accuracy", "gradient_norm", "learning_rate")
    }
    assert {(row["update"], row["quantity"]) for row in rows} == expected
    assert len(rows) == len(expected)
    assert all(row["epoch"] == row["update"] / UPDATES_PER_EPOCH for row in rows)


def test_the_loss_falls(run):
    losses = [row["value"] for row in run(epochs=40).finished().history() if row["quantity"] == "loss"]
    assert np.mean(losses[-6:]) < 0.7 * np.mean(losses[:6])


# Schedule.


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("linear", [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]), ("constant", [0.5] + [1.0] * 9)],
)
def test_the_learning_rate_warms_up_and_then_decays_or_stays(schedule, expected):
    config = OptimisationConfig(learning_rate=1.0, warmup=0.2, schedule=schedule)
    assert [learning_rate(config, update, 10) for update in range(10)] == pytest.approx(expected)


@given(st.integers(1, 500), st.floats(0, 1), st.sampled_from(["linear", "constant"]))
def test_the_learning_rate_is_positive_rises_once_and_never_exceeds_the_initial_one(updates, warmup, schedule):
    config = OptimisationConfig(learning_rate=1e-4, warmup=warmup, schedule=schedule)
    rates = [learning_rate(config, update, updates) for update in range(updates)]
    assert min(rates) > 0
    assert max(rates) == pytest.approx(1e-4)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


# Seeds.


def test_equal_seeds_train_equal_weights_and_other_seeds_others(run):
    first, again, other = (
        run(apart=name, seed=seed, dropout=0.5).finished().weights for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert equal(first, again)
    assert not equal(first, other)


def test_the_global_generators_are_not_relied_on(run):
    plain, disturbed = run(apart="plain", dropout=0.5), run(apart="disturbed", dropout=0.5)
    torch.manual_seed(1)
    plain.trainer.run()
    torch.manual_seed(2)
    disturbed.trainer.run()
    assert equal(plain.weights, disturbed.weights)


# Precision.


class Reader(nn.Module):
    """An encoder, and a layer of its own, which is not rounded."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.output = copy.deepcopy(encoder), nn.Linear(encoder.architecture.hidden_size, 1)


@pytest.fixture
def trained_in(tiny_encoder, tmp_path) -> Callable[..., Trainer]:
    """Builds a trainer of a `Reader` whose loss is the squared output, summed over the frames of each clip."""

    def build(precision: str, seconds: float, watch: Callable[[Reader], Any] = lambda model: None) -> Trainer:
        torch.manual_seed(0)
        model, random = Reader(tiny_encoder), np.random.default_rng(0)
        width = tiny_encoder.architecture.conv_dim[-1]
        local = [random.normal(size=(length, width)).astype(np.float16) for length in (9, 30, 12, 21)]

        def objective(batch: Batch, _: torch.Generator) -> Terms:
            watch(model)
            valid = torch.arange(batch.local.shape[1]) < batch.lengths[:, None]
            outputs = model.output(model.encoder(batch.local, batch.lengths))[..., 0].float()
            return Terms((outputs.square() * valid).sum(), len(batch.indices))

        return Trainer(
            model,
            objective,
            Clips([f"clip{number}" for number in range(len(local))], local),
            config=OptimisationConfig(batch_size=4, learning_rate=1e-2, dropout=0.0, attention_dropout=0.0),
            compute=ComputeConfig(precision=precision, batch_seconds=seconds),
            key=Key(0, 1, "stage"),
            device=torch.device("cpu"),
            checkpoint=tmp_path / "checkpoint.safetensors",
            fingerprint="of this run",
            updates=3,
        )

    return build


@pytest.mark.parametrize("seconds", [100.0, 1e-6])
def test_in_bfloat16_gradients_are_those_of_float32_and_weights_stay_in_it(trained_in, seconds):
    """Of all clips at once, and of one after another, whose gradients are added up in float32."""
    dtypes = []

    def watch(model: Reader) -> None:
        dtypes.append((model.encoder.encoder.layers[0].layer_norm.weight.dtype, model.output.weight.dtype))

    single, half = trained_in("float32", 100.0), trained_in("bfloat16", seconds, watch)
    for trainer in (single, half):
        trainer._update()
    assert set(dtypes) == {(torch.bfloat16, torch.float32)}
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    for name, parameter in single.parameters.items():
        found, expected = half.parameters[name].grad, parameter.grad
        assert (found is None) == (expected is None), name
        if expected is not None and expected.norm() > 1e-3:
            assert found.dtype is torch.float32
            assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.98, name


def test_every_update_in_bfloat16_is_of_the_weights_as_they_are_then(trained_in):
    held: list[torch.Tensor] = []

    def watch(model: Reader) -> None:
        held.append(model.encoder.encoder.layers[0].attention.q_proj.weight.detach().clone())

    trainer, before = trained_in("bfloat16", 100.0, watch), []
    for _ in range(3):
        before.append(trainer.model.encoder.encoder.layers[0].attention.q_proj.weight.detach().bfloat16())
        trainer._update()
    assert all(torch.equal(*pair) for pair in zip(held, before, strict=True))
    assert not torch.equal(before[0], before[2])


def test_an_update_that_breaks_off_leaves_the_weights_as_they_were(trained_in):
    def fail(_: Reader) -> None:
        raise Killed

    trainer = trained_in("bfloat16", 100.0, fail)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(Killed):
        trainer._update()
    assert equal(dict(trainer.model.state_dict()), before)


# Stopping and going on.


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("update", [0, 1, 3, 8])
@pytest.mark.usefixtures("checkpoint_always")
def test_a_run_that_was_killed_ends_as_one_that_was_not(run, update, dropout):
    uninterrupted = run(apart="uninterrupted", dropout=dropout).finished()
    with pytest.raises(Killed):
        run(dropout=dropout, before=stop_at(update, kill)).trainer.run()
    resumed = run(dropout=dropout).finished()
    assert resumed.calls == 3 * UPDATES_PER_EPOCH - update
    assert equal(resumed.weights, uninterrupted.weights)
    assert resumed.history() == uninterrupted.history()
    assert not resumed.checkpoint.exists()


@pytest.mark.usefixtures("checkpoint_always")
def test_a_run_may_be_killed_at_every_update(run):
    uninterrupted = run(apart="uninterrupted", dropout=0.5).finished()
    for update in range(3 * UPDATES_PER_EPOCH):
        with pytest.raises(Killed):
            run(dropout=0.5, before=stop_at(update, kill)).trainer.run()
    resumed = run(dropout=0.5).finished()
    assert equal(resumed.weights, uninterrupted.weights)
    assert resumed.history() == uninterrupted.history()


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("update", [0, 4, 8])
def test_a_signal_saves_after_the_update_and_the_next_run_goes_on(run, update, number):
    handler = signal.getsignal(number)
    uninterrupted = run(apart="uninterrupted", dropout=0.5).finished()
    stopped = run(dropout=0.5, before=stop_at(update, lambda: os.kill(os.getpid(), number)))
    with pytest.raises(SystemExit) as exit_:
        stopped.trainer.run()
    assert exit_.value.code == 128 + number
    assert stopped.update == update + 1
    assert signal.getsignal(number) is handler
    resumed = run(dropout=0.5).finished()
    assert resumed.calls == 3 * UPDATES_PER_EPOCH - update - 1
    assert equal(resumed.weights, uninterrupted.weights)
    assert resumed.history() == uninterrupted.history()


def test_sigterm_that_comes_while_the_clock_is_read_loses_no_update(run, monkeypatch):
    """The loop has then looked for SIGTERM already: it makes one more update, and saves that."""

    class Minutes(float):
        def __rmul__(self, seconds: float) -> float:
            sigterm()
            return math.inf

    monkeypatch.setattr(training, "CHECKPOINT_MINUTES", Minutes())
    stopped = run()
    with pytest.raises(SystemExit):
        stopped.trainer.run()
    monkeypatch.undo()
    assert run().finished().calls == 3 * UPDATES_PER_EPOCH - stopped.update


@pytest.mark.usefixtures("checkpoint_always")
def test_the_checkpoint_of_another_run_is_not_taken_up(run, caplog):
    with pytest.raises(Killed):
        run(fingerprint="of other settings", seed=7, before=stop_at(5, kill)).trainer.run()
    trained = run().finished()
    assert "is of other inputs, settings or code" in caplog.text
    assert equal(trained.weights, run(apart="fresh").finished().weights)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.usefixtures("checkpoint_always")
def test_a_damaged_checkpoint_is_reported_and_not_taken_up(run, caplog, share):
    interrupted = run(before=stop_at(5, kill))
    with pytest.raises(Killed):
        interrupted.trainer.run()
    whole = interrupted.checkpoint.read_bytes()
    interrupted.checkpoint.write_bytes(whole[: int(share * len(whole))])
    with caplog.at_level(logging.WARNING):
        trained = run().finished()
    assert "Training starts from the beginning" in caplog.text
    assert str(interrupted.checkpoint) in caplog.text
    assert equal(trained.weights, run(apart="fresh").finished().weights)


@pytest.mark.parametrize("minutes", [0.0, 10.0], ids=["saving again", "not saving again"])
def test_what_a_kill_in_the_middle_of_a_save_left_is_removed(run, monkeypatch, minutes):
    monkeypatch.setattr(training, "CHECKPOINT_MINUTES", minutes)
    trained = run()
    left = trained.folder / f".{trained.checkpoint.name}.abcdefgh.part"
    left.mkdir()
    (left / "partial").write_bytes(b"half")
    trained.finished().history()
    assert [path.name for path in trained.folder.iterdir()] == ["history.parquet"]


def test_a_write_leaves_one_of_a_longer_name_alone(tmp_path):
    with files.atomic(tmp_path / "model.v2") as temporary:
        temporary.write_text("whole")
        files.write_text(tmp_path / "model", "other")
    assert (tmp_path / "model.v2").read_text() == "whole"


def test_fingerprints_tell_settings_runs_and_inputs_apart(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1")
    other.write_text("2")
    config = OptimisationConfig()
    key = Key(0, 1, "multitask")
    prints = [
        training.fingerprint("multitask", config, key, [one]),
        training.fingerprint("retraining", config, key, [one]),
        training.fingerprint("multitask", OptimisationConfig(dropout=0.2), key, [one]),
        training.fingerprint("multitask", config, Key(1, 1, "multitask"), [one]),
        training.fingerprint("multitask", config, Key(0, 2, "multitask"), [one]),
        training.fingerprint("multitask", config, key, [other]),
        training.fingerprint("multitask", config, key, [one, other]),
    ]
    assert len(set(prints)) == len(prints)
    other.write_text("1")
    assert training.fingerprint("multitask", config, key, [other]) == prints[0]


# Divergence.


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_divergence_names_the_utterances_and_keeps_the_weights_before_it(run, value, where):
    diverging = run()
    weights_before: list[dict[str, Tensor]] = []

    def spoil(update: int) -> None:
        if update == 4:
            weights_before.append(diverging.weights)

    def objective(batch: Batch, generator: torch.Generator) -> Terms:
        terms = diverging.objective(batch, generator)
        if diverging.update != 4:
            return terms
        if where == "loss":
            return Terms(terms.loss * value, terms.count, terms.quantities)
        terms.loss.register_hook(lambda gradient: gradient * value)
        return terms

    diverging.before = spoil
    diverging.trainer.objective = objective
    with pytest.raises(UserError) as error:
        diverging.trainer.run()

    message = str(error.value)
    order = training.epoch_batches(diverging.trainer.clips.lengths, BATCH, Key(0, 1, "stage").generator("order", 1))
    assert "stage, fold 1, seed 0: update 4" in message
    named = re.search(r"Its utterances: (.*?)\. ", message).group(1).split(", ")
    assert sorted(named) == sorted(f"clip{index}" for index in order[1])
    kept = {
        name.removeprefix("model."): tensor
        for name, tensor in load_tensors(diverging.checkpoint)[0].items()
        if name.startswith("model.")
    }
    trained = {name: tensor for name, tensor in weights_before[0].items() if not name.startswith("frozen")}
    assert equal(kept, trained)


# Selection.


def best_of(scores: list[float], seen: list[dict[str, Tensor]]) -> Callable[[Run], float]:
    """Gives these scores epoch by epoch, whatever the weights, and keeps those."""

    def validate(run: Run) -> float:
        assert not run.model.training
        seen.append(run.weights)
        return scores[run.update // UPDATES_PER_EPOCH - 1]

    return validate


@pytest.mark.parametrize(("scores", "best"), [([1, 3, 2], 1), ([3, 1, 2], 0), ([1, 2, 3], 2), ([2, 2, 1], 0)])
def test_the_weights_of_the_best_epoch_are_kept(run, scores, best):
    seen: list[dict[str, Tensor]] = []
    trained = run(dropout=0.5, validate=best_of(scores, seen)).finished()
    assert len(seen) == 3
    assert equal(trained.weights, seen[best])
    assert not any(equal(trained.weights, other) for epoch, other in enumerate(seen) if epoch != best)
    validated = [row for row in trained.history() if row["quantity"] == "validation_uar"]
    assert [(row["update"], row["value"]) for row in validated] == list(zip([2, 5, 8], scores, strict=True))


def test_validation_changes_nothing_but_which_weights_are_kept(run):
    def validate(run: Run) -> float:
        torch.rand(17)
        return run.update  # the last is the best

    assert equal(
        run(apart="validated", dropout=0.5, validate=validate).finished().weights,
        run(apart="plain", dropout=0.5).finished().weights,
    )


@pytest.mark.usefixtures("checkpoint_always")
def test_the_best_epoch_outlives_a_kill(run):
    """Killed in the third epoch, after the first was the best."""
    seen: list[dict[str, Tensor]] = []
    with pytest.raises(Killed):
        run(validate=best_of([3, 1, 2], seen), before=stop_at(7, kill)).trainer.run()
    resumed = run(validate=best_of([3, 1, 2], seen)).finished()
    assert equal(resumed.weights, seen[0])


def test_sigterm_at_the_end_of_an_epoch_does_not_lose_its_validation(run):
    seen: list[dict[str, Tensor]] = []
    with pytest.raises(SystemExit):
        run(validate=best_of([1, 3, 2], seen), before=stop_at(5, sigterm)).trainer.run()
    resumed = run(validate=best_of([1, 3, 2], seen)).finished()
    assert len(seen) == 3
    assert equal(resumed.weights, seen[1])
