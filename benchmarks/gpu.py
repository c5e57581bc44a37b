"""The workflow on one GPU, and from that the time of the paper's run.

    python benchmarks/gpu.py          # about five minutes on an H200
    python benchmarks/gpu.py --toy    # the same code on the CPU, with next to nothing to do, to try it

Measured with HuBERT base (random weights) and noise in clips as long as IEMOCAP's, as much as one of its sessions:

- matrix products alone, the limit of all that follows;
- audio seconds per second, model FLOP utilisation and peak GPU memory of extraction, retraining (alone, and two jobs at
  once, as compute.jobs_per_gpu allows), fine-tuning and evaluation, beside the peer's way (benchmarks/extraction.py,
  benchmarks/training.py) on the same GPU;
- where the time of a retraining update goes, and what its modules reach alone;
- k-means on the CPU, with FAISS on the CPU and on the GPU, and with plain Lloyd in torch on the GPU.

Utilisation is by the operations of docs/speed.md, those that a way itself needs, over the bfloat16 products measured
here; operations of padding do not count. A stage runs on few clips and on many: what it takes for more clips is its
rate, the remainder its start. A row is printed as soon as it is known.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import extraction
import numpy as np
import sides
import training
import workload

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """How much is measured, and where."""

    device: str
    matrix: int
    """Rows and columns of the matrices that are multiplied alone."""
    seconds: float
    """Of audio."""
    few_seconds: float
    """Of audio, for what is slow, and to tell a stage's start from its rate."""
    clips: int
    """Per update."""
    peer_clips: int
    """Per update of the peer's retraining, whose repeated codewords take most of the memory."""
    turns: int
    """Their median counts."""
    frames: int
    """Of k-means."""
    codebooks: tuple[int, ...]
    """Their centroids."""
    repeats: int
    """Of a module alone."""
    shared_seconds: float
    """How long jobs that share the GPU are watched."""
    sizes: dict[str, Any] = field(default_factory=dict)
    """Of the encoder, where not those of HuBERT base."""

    @property
    def updates(self) -> int:
        """Of an epoch: timed at once."""
        return math.ceil(len(workload.clip_seconds(self.seconds)) / self.clips)


SESSION = 25_160 / 5
"""Seconds of audio in one of IEMOCAP's five sessions; a fold is trained on four."""
TINY = {"conv_dim": (64,) * 7, "num_hidden_layers": 8, "intermediate_size": 64, "num_conv_pos_embeddings": 16}
FULL = Plan("cuda", 8192, SESSION, 120.0, 64, 4, 3, 1_000_000, training.SIZES, 20, 8.0)
TOY = Plan("cpu", 256, 30.0, 20.0, 7, 2, 1, 10_000, (64, 512), 1, 0.1, TINY)
CONVOLUTIONS, TRANSFORMER, UPDATE = 4.9, 9.0, 27.0
"""GFLOP per second of audio, docs/speed.md."""
POSITIONS = 2 * 50 * 768 * (768 / 16) * 128 / 1e9
"""Of the transformer's, those of the position embedding."""
PEER_EXTRACTION = sum(CONVOLUTIONS + TRANSFORMER * (13 + layer) / 12 for layer in workload.LAYERS)
PASSES = 21
"""Over the frames in a fit: 20 iterations, and the labels."""
PART = 10
"""k-means is given the same frames so many times, or timed on so small a part of them."""
JOBS = 2
"""That share the GPU, as compute.jobs_per_gpu."""
WARM_UP = 240
"""Updates of training before it is watched: a number of frames is replayed once it has been met three times."""
FOLDS, SEEDS = 5, 3
"""Of the paper's experiment, and of config.yaml, which repeats it with two other seeds."""


@dataclass(frozen=True)
class Measured:
    """What a way of the work reaches."""

    amount: float
    """Seconds of audio, in one turn."""
    rate: float
    """Of these per second."""
    gibibytes: float = 0.0
    """Largest amount of GPU memory that torch held: what is free in it, between the parts that are in use, counts."""
    start: float = 0.0
    """Seconds that a stage takes whatever the amount."""

    @property
    def seconds(self) -> float:
        """Of one turn."""
        return self.amount / self.rate


def clock(plan: Plan) -> float:
    """Seconds, once the GPU has done what it was given."""
    import torch

    if plan.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def memory(plan: Plan) -> Iterator[Callable[[], float]]:
    """Gives a function that tells the GiB of GPU memory that torch held at most since here."""
    import torch

    gc.collect()
    if plan.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_reserved() / 2**30 if plan.device == "cuda" else 0.0


def measure(plan: Plan, work: sides.Work, warm_ups: int = 1) -> Measured:
    """Do the work some times to warm up, and then in turns."""
    rates, amount = [], 0.0
    with memory(plan) as peak:
        for _ in range(warm_ups if plan.device == "cuda" else 1):
            work()
        for _ in range(plan.turns):
            start = clock(plan)
            amount = work()
            rates.append(amount / (clock(plan) - start))
        return Measured(amount, statistics.median(rates), peak())


def measure_stage(plan: Plan, run: Callable[[Path], None], few: Path, many: Path) -> Measured:
    """Run a stage on few clips and on many, in turns."""
    run(few)
    seconds: dict[Path, list[float]] = {few: [], many: []}
    with memory(plan) as peak:
        for folder in plan.turns * [few, many]:
            start = clock(plan)
            run(folder)
            seconds[folder].append(clock(plan) - start)
        of_few, of_many = map(statistics.median, seconds.values())
        amount, more = workload.seconds(few), workload.seconds(many)
        rate = (more - amount) / (of_many - of_few)
        return Measured(more, rate, peak(), max(0.0, of_few - amount / rate))


# Tables.


def table(*header: str) -> None:
    """Begin one."""
    print()
    row(*header)
    row("---", *["---:"] * (len(header) - 1))


def row(*cells: str) -> None:
    """Print it at once."""
    print(f"| {' | '.join(cells)} |", flush=True)


class Rates:
    """The main table, and what it found."""

    def __init__(self, peak: float) -> None:
        """Args: FLOP per second of matrix products in bfloat16."""
        self.peak = peak
        table("Work", "Audio s/s", "Utilisation, %", "Peak GPU memory, GiB")

    def add(self, name: str, gflop: float, found: Measured) -> Measured:
        """Print a row; `gflop` per second of audio."""
        share = 100 * gflop * 1e9 * found.rate / self.peak
        row(name, f"{found.rate:,.0f}", f"{share:.1f}", f"{found.gibibytes:.1f}")
        return found

    def attempt(self, name: str, gflop: float, find: Callable[[], Measured]) -> None:
        """As `add`, for a peer that may need more memory than there is."""
        import torch

        try:
            self.add(name, gflop, find())
        except torch.OutOfMemoryError:
            row(name, "out of memory", "", "")


# What is measured.


def products(plan: Plan) -> float:
    """Print the rates of matrix products, and what may be rounded to TF32; returns FLOP per second in bfloat16."""
    import torch

    def rate(dtype: torch.dtype) -> float:
        left, right = torch.randn(2, plan.matrix, plan.matrix, device=plan.device).to(dtype)
        seconds = []
        for _ in range(30):
            start = clock(plan)
            torch.mm(left, right)
            seconds.append(clock(plan) - start)
        return 2 * plan.matrix**3 / statistics.median(seconds[10:])

    as_set = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    print(f"\nallowed in TF32: matrix products {as_set[0]}, convolutions and LSTMs {as_set[1]}")
    table(f"Matrix products, {plan.matrix} x {plan.matrix}", "TFLOP/s")
    peak = rate(torch.bfloat16)
    row("bfloat16", f"{peak / 1e12:,.1f}")
    row("float32", f"{rate(torch.float32) / 1e12:,.1f}")
    with tf32(allowed=True):
        row("TF32", f"{rate(torch.float32) / 1e12:,.1f}")
    return peak


@contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Matrix products of float32 in TF32, or not."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def extract(plan: Plan, rates: Rates, few: Path, many: Path) -> tuple[Measured, Measured]:
    """Local features and hidden states; returns the measures of the two stages."""
    from gmp_atl.stages.layer_features import layer_features

    gpus, once, twice = int(plan.device == "cuda"), replace(plan, turns=1), replace(plan, turns=2)

    def transform(folder: Path) -> None:
        layer_features(
            config=workload.setting("layer_features", fit_on="all"),
            utterances=folder / "utterances.parquet",
            local_features=folder / "local_features.parquet",
            encoder=folder / "encoder",
            fold=1,
            layers=workload.LAYERS,
            outputs=[folder / f"layer{layer}.parquet" for layer in workload.LAYERS],
            gpus=gpus,
        )

    convolved = measure_stage(twice, lambda folder: workload.convolve(folder, gpus=gpus), few, many)
    rates.add("local_features: WAV files to Parquet", CONVOLUTIONS, convolved)
    rates.add("convolutions alone, of samples in memory", CONVOLUTIONS, measure(plan, convolutions(plan, many)))
    transformed = measure_stage(twice, transform, few, many)
    rates.add("layer_features: eight layers to Parquet", TRANSFORMER, transformed)
    rates.add("transformer alone, eight layers", TRANSFORMER, measure(plan, passes(plan, many)))
    both = 1 / (1 / convolved.rate + 1 / transformed.rate)
    gibibytes = max(convolved.gibibytes, transformed.gibibytes)
    rates.add("extraction: both stages", CONVOLUTIONS + TRANSFORMER, Measured(0.0, both, gibibytes))
    rates.attempt("extraction, peer", PEER_EXTRACTION, lambda: measure(once, peer_extraction(plan, few)))
    return convolved, transformed


def convolutions(plan: Plan, folder: Path) -> sides.Work:
    """Without reading and writing."""
    import soundfile
    import torch

    from gmp_atl import clips, devices, model_files

    device = torch.device(plan.device)
    waves = [(path, soundfile.read(path, dtype="float32")[0]) for path in sorted((folder / "audio").iterdir())]
    model = model_files.load(folder / "encoder")[0].to(device).eval()
    model.cast(devices.dtype("auto", device))

    def work() -> float:
        clips.local_features(model, [wave for _, wave in waves], [path for path, _ in waves], normalise=False)
        return sum(len(wave) for _, wave in waves) / 16_000

    return work


def passes(plan: Plan, folder: Path) -> sides.Work:
    """Eight layers, left on the device."""
    import torch

    from gmp_atl import clips, devices, model_files
    from gmp_atl.frames import FRAME_SECONDS

    device, budget = torch.device(plan.device), workload.setting("layer_features").compute.batch_seconds
    corpus = training.clips(folder)
    model = model_files.load(folder / "encoder")[0].to(device).eval()
    model.cast(devices.dtype("auto", device))

    @torch.inference_mode()
    def work() -> float:
        for batch in clips.passes(corpus, budget, device):
            model.hidden_states(batch.local, batch.lengths, workload.LAYERS)
        return float(corpus.lengths.sum()) * FRAME_SECONDS

    return work


def peer_extraction(plan: Plan, folder: Path) -> sides.Work:
    """As in benchmarks/extraction.py, but with the model loaded once: on so few clips that would be most of it."""
    from transformers import HubertModel

    loaded: Any = HubertModel.from_pretrained(folder / "transformers").train(mode=False)
    loaded.to(plan.device)
    paths = sorted((folder / "audio").iterdir())

    def work() -> float:
        model = copy.deepcopy(loaded)
        for layer in sorted(workload.LAYERS, reverse=True):
            extraction.dump(model, layer, paths, folder / "peer.f32")
        return workload.seconds(folder)

    return work


def train(plan: Plan, rates: Rates, few: Path, many: Path) -> tuple[Measured, Measured, Measured]:
    """Retraining, fine-tuning, evaluation; returns the measures of ours, of retraining alone or shared, if faster."""
    amount = training.Amount(plan.clips, plan.updates, plan.device)
    less = replace(amount, clips=plan.peer_clips)
    padded = replace(amount, updates=math.ceil(plan.updates / 4))  # of clips at random, as good as an epoch

    def add(name: str, gflop: float, side: sides.Side, folder: Path) -> Measured:
        return rates.add(name, gflop, measure(plan, side(folder), math.ceil(WARM_UP / plan.updates)))

    def attempt(name: str, gflop: float, side: sides.Side, folder: Path) -> None:
        rates.attempt(name, gflop, lambda: measure(plan, side(folder)))

    of_clips = f"{plan.clips} clips an update"
    alone = add(f"retraining, {of_clips}", UPDATE, training.retraining("auto", amount), many)
    shared = rates.add(f"retraining, {of_clips}, {JOBS} jobs at once", UPDATE, sharing(plan, many))
    of_less = f"{less.clips} clips an update"
    add(f"retraining, {of_less}", UPDATE, training.retraining("auto", less), many)
    attempt(f"retraining, {of_less}, peer", CONVOLUTIONS + UPDATE, training.peer_retraining(less), many)
    finetuned = add(f"fine-tuning, {of_clips}", UPDATE, training.finetuning("auto", amount), many)
    attempt(f"fine-tuning, {of_clips}, peer", CONVOLUTIONS + UPDATE, training.peer_finetuning(padded), many)
    evaluated = add("evaluation of a session", TRANSFORMER, training.evaluation("auto", plan.device), many)
    attempt("evaluation, peer", CONVOLUTIONS + TRANSFORMER, training.peer_evaluation(plan.device), few)
    return max(alone, shared, key=lambda found: found.rate), finetuned, evaluated


def sharing(plan: Plan, folder: Path) -> Measured:
    """Retraining in several processes at once: all of them together."""
    where = [str(folder), str(plan.clips), plan.device, str(plan.shared_seconds)]
    command = [sys.executable, __file__, "share", *where]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(JOBS)
    ]
    pipes = [(process.stdin, process.stdout) for process in processes]
    for _, output in pipes:
        assert output
        assert output.readline() == "ready\n"
    for process_input, _ in pipes:
        assert process_input
        process_input.write("go\n")
        process_input.flush()
    found = [json.loads(process.communicate()[0]) for process in processes]
    return Measured(0.0, sum(each["rate"] for each in found), sum(each["gibibytes"] for each in found))


def share(folder: Path, clips: int, device: str, seconds: float) -> None:
    """One of the processes; prints its rate once it is told to go."""
    plan = replace(FULL, device=device)
    update = training.retraining("auto", training.Amount(clips, 1, device))(folder)
    with memory(plan) as peak:
        for _ in range(WARM_UP if device == "cuda" else 1):
            update()
        print("ready", flush=True)
        input()
        start, amount = clock(plan), 0.0
        while time.perf_counter() - start < seconds:
            amount += update()
        print(json.dumps({"rate": amount / (clock(plan) - start), "gibibytes": peak()}))


def modules(plan: Plan, rates: Rates, folder: Path) -> None:
    """What an update consists of, alone: forward and backward, without waiting for the host."""
    import torch

    from gmp_atl import devices, model_files
    from gmp_atl.encoder import Regularisation

    device = torch.device(plan.device)
    dtype, length = devices.dtype("auto", device), round(50 * workload.MEAN_SECONDS)
    encoder = model_files.load(folder / "encoder", Regularisation(0.1, 0.1))[0].to(device, dtype).train()
    if plan.device == "cuda":
        encoder.replay(device)
    lengths = torch.full((plan.clips,), length)
    local, hidden = (
        torch.randn(plan.clips, length, width, device=device, dtype=dtype, requires_grad=True)
        for width in (encoder.architecture.conv_dim[-1], workload.DIMENSIONS)
    )

    def work(call: Callable[[], Tensor]) -> sides.Work:
        def repeat() -> float:
            for _ in range(plan.repeats):
                call().sum().backward()  # type: ignore[no-untyped-call]
            return plan.repeats * plan.clips * length / 50

        return repeat

    positions = work(lambda: encoder.encoder.pos_conv_embed(hidden))
    rates.add("position embedding alone, in training", 3 * POSITIONS, measure(plan, positions))
    rates.add("transformer alone, in training", UPDATE, measure(plan, work(lambda: encoder(local, lengths))))


def breakdown(plan: Plan, folder: Path) -> None:
    """Print where an update of retraining spends its time, the GPU being waited for before and after each part."""
    import torch

    import gmp_atl.masked_prediction
    import gmp_atl.masking
    import gmp_atl.training

    parts = [
        ("crops", gmp_atl.training, "random_crops"),
        ("gathering local features", gmp_atl.training, "collate"),
        ("masks", gmp_atl.masking, "span_mask"),
        ("forward", gmp_atl.masked_prediction.MaskedPredictor, "forward"),
        ("backward", torch.Tensor, "backward"),
        ("norm of the gradient", torch.nn.utils, "get_total_norm"),
        ("history", gmp_atl.training.Trainer, "_measure"),
        ("Adam", gmp_atl.training.Trainer, "_step"),
    ]
    spent: defaultdict[str, float] = defaultdict(float)

    def watched(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*positional: Any, **named: Any) -> Any:
            start = clock(plan)
            result = function(*positional, **named)
            spent[part] += clock(plan) - start
            return result

        return call

    with ExitStack() as stack:
        for part, owner, name in parts:
            stack.enter_context(mock.patch.object(owner, name, watched(part, getattr(owner, name))))
        work = training.retraining("auto", training.Amount(plan.clips, plan.updates, plan.device))(folder)
        for _ in range(math.ceil(WARM_UP / plan.updates) if plan.device == "cuda" else 1):
            work()
        spent.clear()
        start = clock(plan)
        work()
        total = clock(plan) - start
    spent["losses, accuracies and the rest"] = total - sum(spent.values())
    table("Part of a retraining update", "ms", "%")
    for part, seconds in spent.items():
        row(part, f"{1000 * seconds / plan.updates:.1f}", f"{100 * seconds / total:.0f}")


# k-means.


def frames(count: int) -> np.ndarray:
    """To fit on, (count, 768)."""
    return workload.clustered(count, np.random.default_rng(1))


def passes_without_torch(count: int, size: int) -> None:
    """Print, as JSON, the seconds of starting centroids and of a pass over `count` frames."""
    from gmp_atl import kmeans

    some = frames(count // PART)
    began = time.perf_counter()
    initial = kmeans.initial_centroids([some], len(some), size, np.random.default_rng(0))
    found = {"start": time.perf_counter() - began}

    def per_pass(source: list[np.ndarray], gpus: int) -> float:
        times = []
        for iterations in (0, 1, 3):  # the first to warm up
            start = time.perf_counter()
            kmeans.lloyd(source, initial, iterations, gpus)
            times.append(time.perf_counter() - start)
        return (times[2] - times[1]) / 2

    found["CPU"] = PART * per_pass([some], 0)
    if importlib.util.find_spec("faiss"):
        import faiss

        index = faiss.IndexFlatL2(some.shape[1])
        index.add(initial)
        index.search(some[:1024], 1)
        began = time.perf_counter()
        index.search(some, 1)
        found["FAISS's search alone, CPU"] = PART * (time.perf_counter() - began)
        if faiss.get_num_gpus():
            found["FAISS, GPU"] = per_pass([some] * PART, 1)
    print(json.dumps(found))


def lloyd(points: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """Plain Lloyd: the frames stay on the device, and every iteration adds all of them up."""
    import torch

    for _ in range(iterations):
        sums, counts = torch.zeros_like(centroids), torch.zeros_like(centroids[:, 0])
        norms = centroids.square().sum(dim=1)
        for block in points.split(32_768):  # type: ignore[no-untyped-call]
            labels = torch.addmm(norms, block, centroids.T, alpha=-2).argmin(dim=1)
            sums.index_add_(0, labels, block)
            counts.index_add_(0, labels, torch.ones_like(block[:, 0]))
        centroids = sums / counts.clamp(min=1)[:, None]
    return centroids


def cluster(plan: Plan) -> tuple[str, float]:
    """Print the table of k-means; returns the way that the workflow would take, and its seconds for the codebooks."""
    import torch

    table("k-means, centroids and way", "s per pass", f"s per fit ({PASSES} passes)", "Peak GPU memory, GiB")
    points = torch.from_numpy(frames(plan.frames // PART)).to(plan.device).repeat(PART, 1)
    totals: defaultdict[str, float] = defaultdict(float)

    def add(size: int, way: str, seconds: float, start: float, gibibytes: str) -> None:
        totals[way] += start + PASSES * seconds
        row(f"{size}, {way}", f"{seconds:.3f}", f"{start + PASSES * seconds:.1f}", gibibytes)

    for size in plan.codebooks:
        found = json.loads(sides.run(__file__, "without torch", f"{plan.frames},{size}"))
        start = found.pop("start")
        for way, seconds in found.items():
            add(size, way, seconds, start, "")
        for way, allowed in (("torch, float32", False), ("torch, TF32", True)):
            with tf32(allowed=allowed), memory(plan) as peak:
                lloyd(points, points[:size], 1)
                began = clock(plan)
                lloyd(points, points[:size], 2)
                add(size, way, (clock(plan) - began) / 2, start, f"{peak():.1f}")
    print(
        f"\n{plan.frames:,} frames, a tenth of them different. On the CPU, {sides.threads()} threads: a tenth, times "
        "ten. Passes are extrapolated from two; a fit includes k-means++ on the CPU. No axis of these frames stands "
        "out, so that the CPU looks at all centroids in full, as it would not for speech."
    )
    way = "FAISS, GPU" if "FAISS, GPU" in totals else "CPU"
    if way == "CPU":
        print("FAISS is not installed here, or sees no GPU.")
    return way, totals[way]


def job_start(plan: Plan) -> float:
    """Seconds until a new process of a stage has the device."""
    code = f"import torch, gmp_atl.stages.retraining; torch.zeros(1, device={plan.device!r})"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


def predict(
    plan: Plan,
    extracted: tuple[Measured, Measured],
    trained: tuple[Measured, Measured, Measured],
    clustered: tuple[str, float],
) -> None:
    """Print the hours of the paper's experiment on one such GPU, one job after the other."""
    convolved, transformed = extracted
    retrained, finetuned, evaluated = trained
    way, codebooks = clustered
    session = SESSION / plan.seconds  # a turn of training is an epoch over `plan.seconds` of audio
    epochs = 15 * 4 * session * finetuned.seconds
    once = [("local_features", 1, 5 * SESSION / convolved.rate + convolved.start)]
    of_seed = [
        ("multitask, as fine-tuning: 15 epochs", FOLDS, epochs),
        ("layer_features", FOLDS, 4 * SESSION / transformed.rate + transformed.start),
        (f"clustering, three codebooks: {way}", 8 * FOLDS, codebooks),
        (
            f"retraining, 20,000 updates, alone or {JOBS} jobs at once",
            8 * FOLDS,
            20_000 * plan.seconds / plan.updates / retrained.rate,
        ),
        ("finetuning, 15 epochs", 11 * FOLDS, epochs),
        ("evaluation", 11 * FOLDS, SESSION / evaluated.rate),
        ("starts of Python", 57 * FOLDS, job_start(plan)),
    ]
    table("Predicted for Tables 2 to 4 on one such GPU", "Times", "Seconds each", "Hours", f"Hours, {SEEDS} seeds")
    totals = np.zeros(2)
    for stages, repeated in ((once, 1), (of_seed, SEEDS)):
        for name, times, seconds in stages:
            hours = times * seconds / 3600 * np.array([1, repeated])
            totals += hours
            row(name, str(times), f"{seconds:,.1f}", *(f"{each:.2f}" for each in hours))
    row("all, one after the other", "", "", *(f"{total:.1f}" for total in totals))
    print("\nNot counted: checkpoints, loading weights in training and evaluation, reading layer features for k-means.")


def prepare(folder: Path, plan: Plan) -> tuple[Path, Path]:
    """Few clips and many, each with the encoder."""
    few, many = folder / "few", folder / "many"
    workload.write_corpus(few, plan.few_seconds)
    workload.write_corpus(many, plan.seconds)
    workload.write_encoder(many, **plan.sizes)
    for name in ("encoder", "transformers"):
        (few / name).symlink_to(many / name)
    return few, many


def main(plan: Plan) -> None:
    """Print all tables."""
    import torch

    if plan.device == "cuda" and not torch.cuda.is_available():
        print(
            "torch finds no CUDA device here. On one this measures extraction, retraining, fine-tuning, evaluation and "
            "k-means at the size of HuBERT base (speed, utilisation, peak memory), and predicts the paper's run."
        )
        return
    name = torch.cuda.get_device_name() if plan.device == "cuda" else "CPU, a toy run: the figures mean nothing"
    print(f"{name}; torch {torch.__version__}; {sides.machine()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        few, many = prepare(Path(folder), plan)
        rates = Rates(products(plan))
        extracted = extract(plan, rates, few, many)
        trained = train(plan, rates, few, many)
        modules(plan, rates, many)
        breakdown(plan, many)
    predict(plan, extracted, trained, cluster(plan))


if __name__ == "__main__":
    if sys.argv[1:2] == ["side"]:  # in a process without torch, which FAISS is not imported beside
        passes_without_torch(*map(int, sys.argv[3].split(",")))
    elif sys.argv[1:2] == ["share"]:
        share(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], float(sys.argv[5]))
    else:
        parser = argparse.ArgumentParser(description="The workflow on one GPU.")
        parser.add_argument("--toy", action="store_true", help="try it on the CPU, with next to nothing to do")
        main(TOY if parser.parse_args().toy else FULL)
