"""No held-out utterance, speaker or session reaches fitting, training, model selection or normalisation.

Properties over corpora, folds and readings that are drawn; and deliberate leaks, planted in the artefacts, which each
stage that reads them must notice from the ids recorded in the artefact itself, wherever that comes from.
"""

from __future__ import annotations

import importlib
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ENCODER, SETTINGS, Codebook, Inputs, Stages, write_utterances
from hypothesis import given, settings
from hypothesis import strategies as st
from test_corpora import write_iemocap, write_manifest

from gmp_atl import clips as clips_module
from gmp_atl import formats, model_files
from gmp_atl.config import FoldsConfig
from gmp_atl.corpora import emodb, ravdess, read_corpus
from gmp_atl.errors import LeakageError, UserError
from gmp_atl.folds import Split, held_out_split, training_split, without_group
from gmp_atl.formats import LAYER_FEATURES, LOCAL_FEATURES, PSEUDO_LABELS, feature_rows
from gmp_atl.stages.pretrained import pretrained

ROOT = Path(__file__).parent.parent
SELECTIONS = ["last", "held_out_training_group", "oracle"]


def disjoint(one: Split, other: Split, *columns: str) -> bool:
    return all(not {*one.column(name)} & {*other.column(name)} for name in columns)


# Every corpus, with the folds that its preset has.


def iemocap_release(root: Path) -> Path:
    names = itertools.product(range(1, 6), "FM", ("impro01", "script02_1"), "FM", range(2))
    labels = [f"Ses0{session}{dialog}_{text}_{gender}00{n}" for session, dialog, text, gender, n in names]
    return write_iemocap(root, {id: ["neu", "hap", "ang", "sad"][n % 4] for n, id in enumerate(labels)})


def emodb_release(root: Path) -> Path:
    for speaker, letter in itertools.product(emodb.GENDER_OF, "WFTN"):
        (root / f"{speaker}a01{letter}a.wav").touch()
    return root


def ravdess_release(root: Path) -> Path:
    for actor, emotion in itertools.product(range(1, 25), ravdess.EMOTIONS):
        (root / f"03-01-{emotion}-01-01-01-{actor:02}.wav").touch()
    return root


def manifest_release(root: Path) -> Path:
    rows = []
    for session, gender, emotion in itertools.product("123", "fm", ("angry", "happy", "neutral", "sad")):
        name = f"{session}{gender}_{emotion}.wav"
        (root / name).touch()
        rows.append(
            {"path": name, "speaker": session + gender, "gender": gender, "emotion": emotion, "session": session}
        )
    return write_manifest(root / "own.csv", rows)


RELEASES = {
    "iemocap": (iemocap_release, None),
    "synthetic": (iemocap_release, None),
    "emodb": (emodb_release, "emodb"),
    "ravdess": (ravdess_release, "ravdess"),
    "manifest": (manifest_release, "manifest"),
}


@pytest.mark.parametrize("reader", RELEASES)
def test_folds_of_every_corpus_share_no_utterance_speaker_or_session(tmp_path: Path, reader: str) -> None:
    make, preset = RELEASES[reader]
    merged = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
    if preset:
        merged |= yaml.safe_load((ROOT / "presets" / f"{preset}.yaml").read_text(encoding="utf-8"))
    folds = FoldsConfig.model_validate(merged["folds"])
    corpus = read_corpus(reader, make(tmp_path), merged["classes"])
    assert not corpus.excluded
    columns = ("id", "path", "speaker", "gender", "session", "emotion")
    rows = [{name: getattr(each, name) for name in columns} for each in corpus.utterances]
    path = write_utterances(tmp_path / "utterances.parquet", rows)
    for fold in range(1, len(folds.held_out) + 1):
        training, held_out = training_split(path, folds, fold), held_out_split(path, folds, fold)
        assert disjoint(training, held_out, "id", "path", "speaker", "session")
        for group in {*range(1, len(folds.held_out) + 1)} - {fold}:
            fitted, validation = without_group(training, folds, group)
            assert validation.ids
            assert disjoint(fitted, validation, "id", "speaker", "session")
            assert disjoint(validation, held_out, "id", "speaker", "session")


# Every stage, on corpora, folds and readings that are drawn. What a stage opens is recorded where features are read.


@st.composite
def made_corpora(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, Any], int]:
    """Utterances of two speakers in each of three or four sessions, folds over them, and one of the folds."""
    sessions = [f"S{n}" for n in range(1, draw(st.integers(3, 4)) + 1)]
    rows = []
    for session, gender in itertools.product(sessions, ("female", "male")):
        for n in range(2 + draw(st.integers(0, 1))):
            speaker, emotion = f"{session}{gender[0]}", ("angry", "sad")[n % 2]
            rows.append(
                {"id": f"{speaker}{n}", "session": session, "speaker": speaker, "gender": gender, "emotion": emotion}
            )
    by = draw(st.sampled_from(["session", "speaker"]))
    names = draw(st.permutations(sorted({row[by] for row in rows})))
    groups = [names[n::3] for n in range(3)]
    return draw(st.permutations(rows)), {"by": by, "held_out": groups}, draw(st.integers(1, 3))


class Opened:
    """Ids of the clips that a stage has read, for training or for choosing an epoch, and of those that it trains on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: set[str] = set()
        self.trained: list[str] = []
        stream = formats.stream_features

        def recorded(kind: Any, path: Path, wanted: Any) -> Any:
            self.read |= {*wanted}
            return stream(kind, path, wanted)

        for module in (formats, clips_module, importlib.import_module("gmp_atl.stages.clustering")):
            monkeypatch.setattr(module, "stream_features", recorded)
        outer = self

        class Trainer:
            """Stands for the training loop: notes what it would train on."""

            def __init__(self, model: Any, objective: Any, clips: Any, **_: Any) -> None:
                outer.trained = clips.ids

            def run(self) -> None:
                pass

            def finish(self, history: Path) -> None:
                history.touch()

        for name in ("multitask", "retraining", "finetuning"):
            monkeypatch.setattr(importlib.import_module(f"gmp_atl.stages.{name}"), "Trainer", Trainer)


def made_inputs(folder: Path, rows: list[dict[str, Any]], encoder: Path) -> Inputs:
    random = np.random.default_rng(0)
    frames = {row["id"]: random.normal(size=(4, 16)).astype(np.float16) for row in rows}
    utterances = write_utterances(folder / "utterances.parquet", rows)
    with LOCAL_FEATURES.writer(folder / "local_features.parquet", dimensions=16, encoder=ENCODER) as append:
        append(feature_rows(list(frames), list(frames.values())))
    return Inputs(utterances, folder / "local_features.parquet", encoder, frames)


@settings(max_examples=8)
@given(made=made_corpora(), selection=st.sampled_from(SELECTIONS), fit_on=st.sampled_from(["training", "all"]))
def test_no_stage_opens_a_held_out_clip_but_the_readings_that_say_so(
    tmp_path_factory: pytest.TempPathFactory, inputs: Inputs, made: Any, selection: str, fit_on: str
) -> None:
    rows, folds, fold = made
    folder = tmp_path_factory.mktemp("made")
    stages = Stages(made_inputs(folder, rows, inputs.encoder), folder)
    changes = {"folds": folds, "finetuning.selection": selection, "clustering.fit_on": fit_on}
    split = training_split(stages.inputs.utterances, FoldsConfig.model_validate(folds), fold)
    held_out = split.forbidden
    with pytest.MonkeyPatch.context() as monkeypatch:
        opened = Opened(monkeypatch)
        multitask = stages.multitask(changes, fold=fold)
        assert opened.read == {*split.ids} == {*opened.trained} == {*multitask.fitted_on}

        features = stages.layer_features(multitask.folder, -1, changes, fold=fold)
        codebook = stages.clustering(features, 4, {**changes, "clustering.sizes": [4]}, fold=fold)
        fitted_on = {*PSEUDO_LABELS.open(codebook.pseudo_labels).header["fitted_on"]}
        assert fitted_on == opened.read == {*split.ids} | (held_out if fit_on == "all" else set())
        assert PSEUDO_LABELS.read(codebook.pseudo_labels)[0]["id"].to_pylist() == split.ids

        opened.read = set()
        retrained = stages.retraining([codebook], changes, fold=fold, layer=-1)
        assert opened.read == {*split.ids} == {*opened.trained} == {*retrained.fitted_on}

        opened.read = set()
        tuned = stages.finetuning(changes, encoder=retrained.folder, fold=fold)
        assert {*opened.trained} <= {*split.ids} == {*tuned.fitted_on}
        if selection == "last":
            assert opened.read == {*opened.trained} == {*split.ids}
        elif selection == "oracle":
            assert opened.read == {*split.ids} | held_out
        else:
            speakers = dict(zip(split.ids, split.column("speaker"), strict=True))
            chosen_on = opened.read - {*opened.trained}
            assert opened.read == {*split.ids}
            assert chosen_on
            assert not {speakers[each] for each in chosen_on} & {speakers[each] for each in opened.trained}


@settings(max_examples=20)
@given(made=made_corpora(), data=st.data())
def test_a_guard_names_whatever_is_not_of_the_split(
    tmp_path_factory: pytest.TempPathFactory, made: Any, data: st.DataObject
) -> None:
    rows, folds, fold = made
    path = write_utterances(tmp_path_factory.mktemp("made") / "utterances.parquet", rows)
    split = training_split(path, FoldsConfig.model_validate(folds), fold)
    own = data.draw(st.lists(st.sampled_from(split.ids)))
    split.refuse_leaks(own, "made")
    leak = data.draw(st.one_of(st.sampled_from(sorted(split.forbidden)), st.just("of another corpus")))
    with pytest.raises(LeakageError, match=leak):
        split.refuse_leaks(data.draw(st.permutations([*own, leak])), "made")


@pytest.mark.parametrize("fold", [-1, 4])
def test_a_fold_that_does_not_exist_is_an_error(inputs: Inputs, fold: int) -> None:
    with pytest.raises(UserError, match=f"There is no fold {fold}"):
        training_split(inputs.utterances, FoldsConfig.model_validate(SETTINGS["folds"]), fold)


# Planted leaks. The guards of each stage in turn are in test_folds.py; here, what an artefact may not hide.


def relabelled(path: Path, destination: Path, kind: formats.Format, **header: Any) -> Path:
    table, metadata = kind.read(path)
    kept = {key: value for key, value in metadata.items() if key in kind.metadata}
    kind.write(destination, table, **{**kept, **header})
    return destination


STRANGERS = ["S1_male_sad", "S1_male_frustrated", "Ses01F_impro01_F000"]
"""A held-out utterance; one of a class that the config no longer has; one of another corpus, as from a cache."""


@pytest.fixture
def plant(
    stages: Stages, upstream: Any, claim_fitted_on: Callable[[Path, list[str]], Path]
) -> Callable[[str, str], None]:
    """Runs a stage on an artefact whose recorded ids have one more, from a folder as a cache has."""
    cache = stages.folder / "cache"
    cache.mkdir()
    book = upstream.codebooks[0]

    def run(what: str, stranger: str) -> None:
        ids = [*upstream.multitask.fitted_on, stranger]
        if what == "layer features":
            features = relabelled(upstream.layer_features, cache / "f.parquet", LAYER_FEATURES, fitted_on=ids)
            stages.clustering(features, 4)
        elif what == "pseudo-labels":
            labels = relabelled(book.pseudo_labels, cache / "l.parquet", PSEUDO_LABELS, fitted_on=ids)
            stages.retraining([Codebook(book.centroids, labels)])
        elif what == "head":
            folder = Path(shutil.copytree(upstream.multitask.folder, cache / "head"))
            tensors, metadata = model_files.load_tensors(folder / "head.safetensors")
            model_files.save_tensors(tensors, folder / "head.safetensors", **{**metadata, "fitted_on": ids})
            stages.finetuning({"finetuning.head": "multitask"}, multitask_head=folder)
        else:
            encoder = claim_fitted_on(upstream.multitask.folder, ids)
            stage = {
                "features": stages.layer_features,
                "retraining": stages.retraining,
                "finetuning": stages.finetuning,
            }
            first = {"features": (encoder, -1), "retraining": (upstream.codebooks,), "finetuning": ()}
            stage[what](*first[what], **({} if what == "features" else {"encoder": encoder}))

    return run


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("what", ["layer features", "pseudo-labels", "head", "features", "retraining", "finetuning"])
def test_a_planted_leak_is_caught_from_the_ids_in_the_artefact(
    plant: Callable[[str, str], None], what: str, stranger: str
) -> None:
    with pytest.raises(LeakageError, match=stranger):
        plant(what, stranger)


def test_an_encoder_of_a_run_is_refused_as_the_pre_trained_one(stages: Stages, upstream: Any, tmp_path: Path) -> None:
    settings = {"encoder.source": "directory", "encoder.path": str(upstream.multitask.folder)}
    fitted_on = sorted(upstream.multitask.fitted_on)
    with pytest.raises(LeakageError, match=f"fitted on {len(fitted_on)} utterances .{fitted_on[0]} among them"):
        pretrained(config=stages.config("pretrained", settings), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encoder_that_does_not_say_what_it_was_fitted_on_is_refused(stages: Stages, tmp_path: Path) -> None:
    encoder, _ = model_files.load(stages.inputs.encoder)
    for metadata in (
        {},
        {"encoder": "x"},
        {"encoder": "x", "fitted_on": "S1_male_sad"},
        {"encoder": "x", "fitted_on": [1]},
    ):
        model_files.save(encoder, tmp_path / "foreign", **metadata)
        for stage in (stages.multitask, stages.finetuning):
            with pytest.raises(UserError, match="does not say which utterances it was fitted on"):
                stage(encoder=tmp_path / "foreign")


def test_ids_that_were_taken_out_of_an_artefact_by_hand_are_missed_by_the_digest(upstream: Any, tmp_path: Path) -> None:
    for path in (upstream.layer_features, upstream.multitask.folder / "model.safetensors"):
        data = path.read_bytes()
        assert data.count(b"S2_male_sad") > 0
        (tmp_path / path.name).write_bytes(data.replace(b"S2_male_sad", b"S2_male_xxx"))
        read = LAYER_FEATURES.open if path.suffix == ".parquet" else model_files.load_tensors
        with pytest.raises(UserError, match=r"is damaged|not a readable"):
            read(tmp_path / path.name)


# Artefacts of another layer, codebook or encoder: no leak, but no silence either.


def test_features_of_another_layer_are_refused(stages: Stages, upstream: Any) -> None:
    with pytest.raises(UserError, match="holds layer -3, but layer -1 is expected"):
        stages.clustering(upstream.layer_features, 4, layer=-1)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"layer": -1}, "layer -1, but layer -3"),
        ({"size": 16}, "size 16, but size 4 or 8"),
        ({"encoder": "another"}, "encoder another, but encoder tiny random HuBERT"),
    ],
)
def test_pseudo_labels_of_another_layer_codebook_or_encoder_are_refused(
    stages: Stages, upstream: Any, tmp_path: Path, header: dict[str, Any], words: str
) -> None:
    book = upstream.codebooks[0]
    labels = relabelled(book.pseudo_labels, tmp_path / "labels.parquet", PSEUDO_LABELS, **header)
    with pytest.raises(UserError, match=f"labels.parquet holds pseudo-labels of {words}"):
        stages.retraining([Codebook(book.centroids, labels)])


def test_normalisation_sees_one_clip_at_a_time(stages: Stages, inputs: Inputs, tmp_path: Path) -> None:
    """What a held-out clip is like moves no feature of a training clip: each file of one clip gives the same rows."""
    import soundfile

    from gmp_atl.stages.local_features import local_features

    random, rows = np.random.default_rng(0), []
    for n in range(3):
        soundfile.write(tmp_path / f"u{n}.wav", 0.1 * 10**-n * random.normal(size=2_000), 16_000, subtype="FLOAT")
        rows.append({"id": f"u{n}", "session": f"S{n}", "speaker": f"s{n}", "n_samples": 2_000})
    config = stages.config("local_features", {"encoder.normalise_audio": True})

    def features(some: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        utterances = write_utterances(tmp_path / "utterances.parquet", some)
        output = tmp_path / "features.parquet"
        local_features(config=config, utterances=utterances, audio_root=tmp_path, encoder=inputs.encoder, output=output)
        return formats.read_features(LOCAL_FEATURES, output, [row["id"] for row in some])[0]

    together = features(rows)
    for row in rows:
        np.testing.assert_array_equal(features([row])[row["id"]], together[row["id"]])
