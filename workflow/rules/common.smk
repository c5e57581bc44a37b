# What the rules share: the validated config, slices of it, and the paths that wildcards alone cannot say.
import json
import sys
from functools import cache
from hashlib import sha256
from pathlib import Path
from shlex import quote

sys.path.insert(0, str(Path(workflow.basedir) / "src"))

from gmp_atl import config as typed
from gmp_atl import config_files
from gmp_atl.code import code_hash
from gmp_atl.errors import UserError
from gmp_atl.systems import BASELINE, check_layers, main_system, systems

try:
    for path in workflow.configfiles:
        config_files.check(Path(path))
    CONFIG = typed.parse(config)
    check_layers(CONFIG)
except UserError as error:
    raise WorkflowError(str(error)) from None


pathvars:
    results=f"results/{CONFIG.name}",
    logs=f"results/{CONFIG.name}/logs",
    benchmarks=f"results/{CONFIG.name}/benchmarks",
    histories=f"results/{CONFIG.name}/evaluations/histories",
    provenance=f"results/{CONFIG.name}/evaluations/provenance",


# Rules call the package by its source folder, so that it need not be installed in their environments.
shell.prefix(
    f"set -euo pipefail; export PYTHONPATH={quote(f'{workflow.basedir}/src')} "
    f"GMP_ATL_CHECKPOINT_MINUTES={CONFIG.compute.checkpoint_minutes} "
    f"GMP_ATL_JOBS_PER_GPU={CONFIG.compute.jobs_per_gpu}; "
)


wildcard_constraints:
    variant="[a-z0-9][a-z0-9_-]*",
    fold=r"\d+",
    seed=r"\d+",
    layer=r"0|-\d+",
    iteration=r"\d+",
    updates=r"\d+|last",
    gmps=r"none|-\d+",
    size=r"\d+",
    loss="ce|ams",


# Thousands of jobs ask the same of a few variants.
@cache
def variant(name):
    return typed.variant(CONFIG, name)


@cache
def shared(stage, name):
    return typed.shared_variant(CONFIG, stage, name)


def settings(stage):
    """The config slice of a stage under the variant of the job, as JSON: what Snakemake tracks."""

    @cache
    def of_variant(name):
        return json.dumps(typed.slice_for(variant(name), stage), sort_keys=True)

    return lambda wildcards: of_variant(wildcards.get("variant", "main"))


def made_by(stage, pattern, wildcards, **others):
    """`pattern` for this job, under the variant that makes it: variants share what their changes do not reach."""
    return pattern.format(**{**wildcards, **others, "variant": shared(stage, wildcards.variant)})


CORPUS_ROOT = f"results/{CONFIG.name}/release" if CONFIG.corpus.reader == "synthetic" else str(CONFIG.corpus.root)
# A manifest is a file; the audio lies relative to its folder.
AUDIO_ROOT = str(Path(CORPUS_ROOT).parent) if CONFIG.corpus.reader == "manifest" else CORPUS_ROOT
EVALUATIONS = Path(f"results/{CONFIG.name}/evaluations")
READ_FROM = Path(f"results/{CONFIG.name}/corpus/root.txt")
SEEDS = CONFIG.seeds
FOLDS = range(1, len(CONFIG.folds.held_out) + 1)
SIZES = CONFIG.clustering.sizes
SYSTEMS = systems(CONFIG)
# The first job of the main system, whose utterances the report shows.
FIRST = {"variant": "main", "layer": CONFIG.tables.layer, "gmps": CONFIG.tables.layer, "loss": "ams"}
FIRST |= {"fold": 1, "seed": SEEDS[0]}
ITERATIONS = range(1, 1 + len(CONFIG.pretraining.iterations)) if CONFIG.pretraining else []
# Updates after which an encoder is kept, as the stage names them: the first is untrained.
UPDATES = [0, *sorted(CONFIG.pretraining.probes), "last"] if CONFIG.pretraining else []
# Pages of the report.
CATEGORIES = {
    "Tables of the paper": ["table1", "table2", "table3", "table4"],
    "Claims of the paper": ["claims", "effects"],
    "Ablations": ["ablations"],
    "Folds and sessions": ["scores", "folds", "per_fold", "per_session"],
    "Confusions": ["confusion", "confusions"],
    "Training": ["training"],
    "Codebooks": ["clusters"],
    "Utterances": ["embeddings", "utterances"],
    "Provenance": ["jobs", "provenance"],
}
# Layers whose GMPs the tables ask for.
GMPS = sorted({system.layer for system in SYSTEMS if system.layer is not None}, reverse=True)


def is_read():
    """Whether an earlier run has read this corpus, with these settings, by this code."""
    record = EVALUATIONS / "provenance/corpus.json"
    if not record.exists() or READ_FROM.read_text(encoding="utf-8").splitlines() != release():
        return False
    from gmp_atl.provenance import Record

    made = Record.model_validate_json(record.read_bytes())
    return (made.code, made.config) == (code_hash("corpus"), typed.slice_for(CONFIG, "corpus"))


def missing_corpus():
    """What is wrong where nothing is at corpus.root, unless what an earlier run has left stands in for the corpus."""
    from gmp_atl.corpora import missing_release

    if not READ_FROM.exists():
        evaluated_before = all(Path(path).exists() for path in [*evaluated(), *illustrated()])
        return None if evaluated_before else missing_release(CONFIG.corpus.reader, CORPUS_ROOT)
    read_from = READ_FROM.read_text(encoding="utf-8").splitlines()[0]
    if read_from != CORPUS_ROOT:
        return (
            f"{CORPUS_ROOT} does not exist; results/{CONFIG.name} was made from the corpus at {read_from}. Give "
            "that as corpus.root, as that run did (with make: CONFIG=\"corpus='{root: ...}'\"), or another name than "
            f"{CONFIG.name} for a run of its own."
        )
    return None if is_read() else missing_release(CONFIG.corpus.reader, CORPUS_ROOT)


def refused_corpus():
    """What the stage would refuse of a corpus that it is to read anew."""
    from gmp_atl.stages.corpus import check

    try:
        check(typed.CorpusSlice.model_validate(typed.slice_for(CONFIG, "corpus")), Path(CORPUS_ROOT))
    except UserError as error:
        return str(error)
    return None


def index_of_release(_):
    """Of the synthetic corpus. Any other must be there already; asked here, since what reads none runs without.

    To read one anew in vain would take what a finished run is built on: Snakemake removes a job's files before it.
    """
    synthetic, problem = CONFIG.corpus.reader == "synthetic", None
    if Path(CORPUS_ROOT).exists():
        if READ_FROM.exists() and not is_read():
            problem = refused_corpus()
    elif not synthetic:
        problem = missing_corpus()
    if problem:
        # After an exception Snakemake would go on with whatever an earlier run has left.
        sys.exit(f"Error: {problem}")
    return rules.synthesis.output.index if synthetic else []


@cache
def release():
    """Where the corpus lies and, of a manifest, a digest of what it says: other ones have the corpus read anew."""
    root = Path(CORPUS_ROOT)
    if CONFIG.corpus.reader == "manifest" and root.is_file():
        return [CORPUS_ROOT, sha256(root.read_bytes()).hexdigest()[:16]]
    if CONFIG.corpus.reader != "synthetic" and not root.exists() and READ_FROM.exists():
        return READ_FROM.read_text(encoding="utf-8").splitlines()
    return [CORPUS_ROOT]


def encoder_of_stage_1(wildcards):
    return made_by("multitask", rules.multitask.output.encoder, wildcards)


def first(output):
    """Of the first job of the main system."""
    [path] = expand(output, **FIRST)
    return path


def codebooks(output, made):
    """One file for each layer and size that `made` says of the job."""
    return lambda wildcards: [
        made_by("clustering", output, wildcards, layer=layer, size=size) for layer, size in made(wildcards)
    ]


def retrained_with(wildcards):
    """Layer and sizes of the codebooks that a variant is retrained with."""
    return [(wildcards.layer, size) for size in variant(wildcards.variant).clustering.sizes]


def clustered_by(wildcards):
    """Layers and sizes of the codebooks that a variant makes for itself, and for those that share its clustering.

    The main run is evaluated with GMPs of all layers that the tables ask for, ablations with those of one.
    """
    sharing = [name for name in ("main", *CONFIG.ablations) if shared("clustering", name) == wildcards.variant]
    layers = {name: GMPS if name == "main" else [CONFIG.tables.layer] for name in sharing}
    return sorted(
        {(layer, size) for name in sharing for layer in layers[name] for size in variant(name).clustering.sizes}
    )


def start_of_retraining(wildcards):
    """The reading retraining.start: the pre-trained HuBERT, or that of stage 1."""
    if variant(wildcards.variant).retraining.start == "pretrained":
        return rules.pretrained.output.encoder
    return encoder_of_stage_1(wildcards)


def start_of_finetuning(wildcards):
    """The retrained HuBERT, or, without GMPs, the pre-trained one."""
    if wildcards.gmps == "none":
        return rules.pretrained.output.encoder
    return made_by("retraining", rules.retraining.output.encoder, wildcards, layer=wildcards.gmps)


def head_of_stage_1(wildcards):
    """Only for the reading finetuning.head: multitask; rows without GMPs leave stage 1 out."""
    if wildcards.gmps == "none" or variant(wildcards.variant).finetuning.head == "fresh":
        return []
    return made_by("multitask", rules.multitask.output.head, wildcards)


def encoder_before(wildcards):
    """Of the iteration of pre-training before; the first has none."""
    before = int(wildcards.iteration) - 1
    return rules.pretraining.output.last.format(iteration=before) if before else []


def clustered_speech(wildcards):
    """Layer 0 stands for MFCCs."""
    if wildcards.layer == "0":
        return rules.mfcc.output.features
    return rules.speech_layer_features.output.layers[0].format(**wildcards)


def codebooks_of_iteration(wildcards):
    """Pseudo-labels of the speech; fold 0 holds out nothing."""
    iteration = CONFIG.pretraining.iterations[int(wildcards.iteration) - 1]
    found = {"iteration": wildcards.iteration, "fold": 0, "seed": SEEDS[0], "layer": iteration.layer}
    return expand(rules.speech_clustering.output.labels, size=iteration.sizes, **found)


def settings_of_iteration(wildcards):
    """What pre-training reads, up to the iteration of the job."""
    return json.dumps(typed.slice_for(typed.up_to(CONFIG, int(wildcards.iteration)), "pretraining"), sort_keys=True)


def predictions_of(system):
    """One file per fold and, but for the classical reference, per seed."""
    if system == BASELINE:
        return expand(rules.baseline.output.predictions, fold=FOLDS)
    of_system = {"variant": system.variant, "gmps": system.layer or "none", "loss": system.loss}
    return expand(rules.evaluation.output.predictions, **of_system, fold=FOLDS, seed=SEEDS)


def evaluated():
    """Every evaluation that the tables ask for, and what they tell of the codebooks."""
    files = [path for system in SYSTEMS for path in predictions_of(system)]
    if GMPS:
        variants = {shared("clustering", name) for name in ("main", *CONFIG.ablations)}
        files += expand(rules.cluster_statistics.output.statistics, variant=sorted(variants), fold=FOLDS, seed=SEEDS)
    return files


def illustrated():
    """What only figures show: utterances of the main system, where it is evaluated."""
    asked = main_system(CONFIG) in SYSTEMS
    return [rules.examples.output.embeddings, rules.examples.output.examples] if asked else []


def page(folder, name, suffix):
    """A file of the results as a page of the report, in its category."""
    kind = {"html": "table", "svg": "figure"}[suffix]
    caption = f"../report/{'tables' if kind == 'table' else name}.rst"
    [category] = [category for category, names in CATEGORIES.items() if name in names]
    # One label alone: a page whose labels do not combine in every way breaks Snakemake's report.
    labels = {"shows": f"{name.replace('_', ' ')} ({kind})"}
    path = f"<results>/{folder}/{name}.{suffix}"
    return report(path, caption=caption, category=category, labels=labels)
