"""Folds are disjoint and cover the corpus; and no stage takes in what has seen a held-out utterance."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmp_atl.config import FoldsConfig
from gmp_atl.errors import LeakageError, UserError
from gmp_atl.folds import check_folds, everything, held_out_split, training_split, without_group
from gmp_atl.formats import LAYER_FEATURES, PSEUDO_LABELS, UTTERANCES, feature_rows
from gmp_atl.stages.cluster_statistics import cluster_statistics

SESSIONS = ["A", "B", "C", "D"]
GROUPS = st.sampled_from([[["A"], ["B"], ["C"], ["D"]], [["A", "C"], ["B"], ["D"]], [["D", "B"], ["C", "A"]]])


@st.composite
def corpora(draw):
    """Utterances of every session in any order, and one speaker of either gender per session."""
    drawn = draw(st.lists(st.tuples(st.sampled_from(SESSIONS), st.sampled_from("fm")), max_size=30))
    shuffled = draw(st.permutations([*drawn, *((session, "f") for session in SESSIONS)]))
    return [
        {"id": f"u{number}", "session": session, "speaker": session + gender}
        for number, (session, gender) in enumerate(shuffled)
    ]


@settings(max_examples=40)
@given(corpora(), GROUPS, st.sampled_from(["session", "speaker"]))
def test_every_utterance_is_held_out_by_one_fold_and_trained_on_by_the_others(
    tmp_path_factory, write_utterances, rows, groups, by
):
    present = {row["speaker"] for row in rows}
    if by == "speaker":
        groups = [[speaker for speaker in sorted(present) if speaker[0] in group] for group in groups]
    folds = FoldsConfig(by=by, held_out=groups)
    path = write_utterances(tmp_path_factory.mktemp("folds") / "utterances.parquet", rows)
    everyone = {row["id"] for row in rows}
    tested = []
    for fold, group in enumerate(groups, start=1):
        training, held_out = training_split(path, folds, fold), held_out_split(path, folds, fold)
        assert {*training.ids} | {*held_out.ids} == everyone
        assert not {*training.ids} & {*held_out.ids}
        assert training.forbidden == {*held_out.ids}
        assert held_out.forbidden == {*training.ids}
        assert {*held_out.column(by)} == {*group}
        assert not {*training.column("speaker")} & {*held_out.column("speaker")}
        tested += held_out.ids
    assert sorted(tested) == sorted(everyone)


@settings(max_examples=20)
@given(corpora(), st.integers(1, 4), st.integers(1, 4))
def test_a_group_cut_out_for_validation_becomes_forbidden(tmp_path_factory, write_utterances, rows, fold, group):
    folds = FoldsConfig(by="session", held_out=[["A"], ["B"], ["C"], ["D"]])
    path = write_utterances(tmp_path_factory.mktemp("folds") / "utterances.parquet", rows)
    whole = training_split(path, folds, fold)
    remaining, validation = without_group(whole, folds, group)
    assert {*remaining.ids} | {*validation.ids} == {*whole.ids}
    assert not {*remaining.ids} & {*validation.ids}
    assert {*validation.column("session")} <= {SESSIONS[group - 1]}
    assert remaining.forbidden == whole.forbidden | {*validation.ids}
    assert validation.forbidden == whole.forbidden


def test_nothing_is_forbidden_where_everything_is_asked_for(inputs):
    assert everything(inputs.utterances).ids == list(inputs.frames)
    assert everything(inputs.utterances).forbidden == frozenset()


@pytest.mark.parametrize(
    ("held_out", "by", "complaint"),
    [
        ([["S1"], ["S2"]], "session", "sessions without a fold: S3; named but absent: none"),
        ([["S1"], ["S2"], ["S3"], ["S4"]], "session", "without a fold: none; named but absent: S4"),
        ([["S1f", "S1m"], ["S2f", "S2m", "S3f"]], "speaker", "speakers without a fold: S3m"),
    ],
)
def test_folds_that_do_not_cover_the_corpus_are_refused(inputs, held_out, by, complaint):
    with pytest.raises(UserError, match=complaint):
        training_split(inputs.utterances, FoldsConfig(by=by, held_out=held_out), 1)


def test_a_speaker_on_both_sides_is_named():
    rows = {"session": ["A", "A", "B", "C"], "speaker": ["one", "two", "three", "two"]}
    with pytest.raises(UserError, match="Speaker two is in fold 1 and in fold 2"):
        check_folds(pa.table(rows), FoldsConfig(by="session", held_out=[["A"], ["B", "C"]]))


def test_a_speaker_in_two_sessions_of_one_fold_is_no_leak():
    rows = {"session": ["A", "B", "C"], "speaker": ["one", "one", "two"]}
    check_folds(pa.table(rows), FoldsConfig(by="session", held_out=[["A", "B"], ["C"]]))


def test_an_utterance_in_no_session_is_no_fold(tmp_path, write_utterances):
    path = write_utterances(tmp_path / "u.parquet", [{"id": "x", "session": "", "speaker": "s"}])
    with pytest.raises(UserError, match="does not cover"):
        training_split(path, FoldsConfig(by="session", held_out=[["A"], ["B"]]), 1)


@pytest.mark.parametrize("fold", [-1, 0, 4])
def test_a_fold_that_there_is_not_is_refused(inputs, fold):
    folds = FoldsConfig(by="session", held_out=[["S1"], ["S2"], ["S3"]])
    for split in (training_split, held_out_split):
        with pytest.raises(UserError) as told:
            split(inputs.utterances, folds, fold)
        assert str(told.value) == f"There is no fold {fold}: folds.held_out has groups for folds 1 to 3."


def test_fold_0_trains_on_all_speech_without_labels_and_is_tested_on_nothing(inputs, tmp_path):
    folds = FoldsConfig(by="session", held_out=[["S1"], ["S2"], ["S3"]])
    table, header = UTTERANCES.read(inputs.utterances)
    unlabelled = table.set_column(table.schema.get_field_index("emotion"), "emotion", pa.array([""] * len(table)))
    UTTERANCES.write(tmp_path / "unlabelled.parquet", unlabelled, **header)
    assert training_split(tmp_path / "unlabelled.parquet", folds, 0).ids == list(inputs.frames)
    with pytest.raises(UserError, match="There is no fold 0"):
        held_out_split(tmp_path / "unlabelled.parquet", folds, 0)


def test_what_is_wrong_with_folds_is_told_in_full():
    rows = pa.table({"session": ["D", "A", "C", "B"], "speaker": ["one", "two", "one", "one"]})
    with pytest.raises(UserError) as told:
        check_folds(rows, FoldsConfig(by="session", held_out=[["A"], ["F", "E"]]))
    assert str(told.value) == (
        "folds.held_out does not cover the corpus: sessions without a fold: B, C, D; named but absent: E, F."
    )
    with pytest.raises(UserError) as told:
        check_folds(rows, FoldsConfig(by="session", held_out=[["A", "D"], ["B", "C"]]))
    assert str(told.value) == (
        "Speaker one is in fold 1 and in fold 2: the folds would not be speaker-independent. "
        "Change folds.held_out, or set folds.by: speaker."
    )


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (["S2_male_sad", "S1_male_sad"], "1 held-out utterances of this fold (S1_male_sad)"),
        (["S1_c", "S1_male_sad", "S1_female_sad"], "2 held-out utterances of this fold (S1_female_sad, S1_male_sad)"),
        (["c", "a", "b"], "3 utterances that are not in the corpus's table (a, b, c)"),
        (["d", "c", "a", "b"], "4 utterances that are not in the corpus's table (a, b, c, ...)"),
    ],
)
def test_a_leak_is_told_with_its_first_ids_the_held_out_ones_before_the_unknown(inputs, ids, told):
    split = training_split(inputs.utterances, FoldsConfig(by="session", held_out=[["S1"], ["S2"], ["S3"]]), 1)
    with pytest.raises(LeakageError) as error:
        split.refuse_leaks(ids, "features.parquet")
    assert str(error.value) == (
        f"features.parquet contains or was fitted on {told}. It belongs to another fold or corpus, or was made "
        "wrongly; delete it and run snakemake again."
    )


# Guards. Fold 1 holds out session S1; each stage is handed something that has seen it.


def test_multitask_refuses_an_encoder_that_was_fitted_on_a_held_out_utterance(stages, claim_fitted_on):
    encoder = claim_fitted_on(stages.inputs.encoder, ["S3_male_sad", "S1_male_sad"])
    with pytest.raises(LeakageError, match=r"1 held-out utterances of this fold \(S1_male_sad\)"):
        stages.multitask(encoder=encoder)


def test_layer_features_refuse_the_encoder_of_another_fold(stages, upstream):
    with pytest.raises(LeakageError, match="4 held-out utterances of this fold"):
        stages.layer_features(upstream.multitask.folder, -1, fold=2)


def test_layer_features_hold_no_held_out_utterance(upstream, inputs):
    ids = pq.read_table(upstream.layer_features)["id"].to_pylist()
    assert ids == inputs.ids("S2", "S3")


def rewritten(path, destination, kind, *, header=None, ids=None):
    """A copy of a file of features with other metadata, or with its first clips renamed."""
    table, metadata = kind.read(path)
    if ids:
        names = [*ids, *table["id"].to_pylist()[len(ids) :]]
        table = table.set_column(0, kind.schema.field("id"), pa.array(names))
    del metadata["format"], metadata["version"]
    kind.write(destination, table, **{**metadata, **(header or {})})
    return destination


@pytest.mark.parametrize("fit_on", ["training", "all"])
def test_clustering_refuses_features_that_were_fitted_on_a_held_out_utterance(stages, upstream, tmp_path, fit_on):
    """Even where k-means may see the held-out frames: the encoder behind them may not have."""
    changes = {"clustering.fit_on": fit_on}
    features = upstream.layer_features
    if fit_on == "all":
        features = stages.layer_features(upstream.multitask.folder, -3, changes)
    header = {"fitted_on": ["S1_male_sad", "S2_male_sad"]}
    leaking = rewritten(features, tmp_path / "leaking.parquet", LAYER_FEATURES, header=header)
    with pytest.raises(LeakageError, match=f"^{leaking} .*S1_male_sad"):
        stages.clustering(leaking, 4, changes)


def test_clustering_refuses_features_of_a_held_out_utterance(stages, upstream, tmp_path):
    header = {"dimensions": 32, "layer": -3, "encoder": "made", "fitted_on": []}
    with LAYER_FEATURES.writer(tmp_path / "more.parquet", **header) as append:
        for batch in LAYER_FEATURES.read(upstream.layer_features)[0].to_batches():
            append(batch)
        append(feature_rows(["S1_male_sad"], [stages.inputs.frames["S1_male_sad"].repeat(2, axis=1)]))
    with pytest.raises(LeakageError, match="S1_male_sad"):
        stages.clustering(tmp_path / "more.parquet", 4)


def test_transductive_features_serve_the_transductive_reading_alone(stages, upstream):
    features = stages.layer_features(upstream.multitask.folder, -3, {"clustering.fit_on": "all"})
    with pytest.raises(LeakageError, match="4 held-out utterances"):
        stages.clustering(features, 4)


def test_retraining_refuses_an_encoder_that_was_fitted_on_a_held_out_utterance(stages, upstream, claim_fitted_on):
    with pytest.raises(LeakageError, match="S1_male_sad"):
        stages.retraining(upstream.codebooks, encoder=claim_fitted_on(stages.inputs.encoder, ["S1_male_sad"]))


def test_retraining_refuses_the_pseudo_labels_of_another_fold(stages, upstream):
    with pytest.raises(LeakageError, match=r"labels.parquet .* held-out utterances"):
        stages.retraining(upstream.codebooks, fold=3)


@pytest.mark.parametrize("fit_on", ["training", "all"])
def test_retraining_refuses_pseudo_labels_of_a_held_out_utterance(stages, upstream, tmp_path, fit_on):
    """In either reading: being fitted on held-out frames is one thing, training on their labels another."""
    made = upstream.codebooks[0]
    leaking = rewritten(made.pseudo_labels, tmp_path / "labels.parquet", PSEUDO_LABELS, ids=["S1_male_sad"])
    with pytest.raises(LeakageError, match="S1_male_sad"):
        stages.retraining([replace(made, pseudo_labels=leaking)], {"clustering.fit_on": fit_on})


def test_a_transductive_codebook_is_refused_unless_the_reading_says_so(stages, upstream):
    changes = {"clustering.fit_on": "all", "retraining.updates": 1}
    features = stages.layer_features(upstream.multitask.folder, -3, changes)
    codebook = stages.clustering(features, 4, changes)
    with pytest.raises(LeakageError, match="4 held-out utterances"):
        stages.retraining([codebook])
    assert not set(stages.retraining([codebook], changes).fitted_on) & set(stages.inputs.ids("S1"))


def test_cluster_statistics_refuse_the_codebook_of_another_fold(stages, upstream):
    with pytest.raises(LeakageError, match="4 held-out utterances"):
        cluster_statistics(
            config=stages.config("cluster_statistics"),
            utterances=stages.inputs.utterances,
            centroids=[upstream.codebooks[0].centroids],
            pseudo_labels=[upstream.codebooks[0].pseudo_labels],
            variant="main",
            fold=2,
            seed=0,
            output=stages.folder / "statistics.parquet",
        )


def test_finetuning_refuses_an_encoder_that_was_fitted_on_a_held_out_utterance(stages, upstream):
    retrained = stages.retraining(upstream.codebooks, {"retraining.updates": 1})
    with pytest.raises(LeakageError, match="4 held-out utterances"):
        stages.finetuning(encoder=retrained.folder, fold=2)


def test_finetuning_refuses_the_head_of_another_fold(stages, upstream):
    """Stage 1's head has seen labels, too."""
    changes = {"finetuning.head": "multitask"}
    with pytest.raises(LeakageError, match="4 held-out utterances"):
        stages.finetuning(changes, multitask_head=upstream.multitask.folder, fold=2)


def test_evaluation_refuses_a_model_that_was_fitted_on_what_it_is_tested_on(stages):
    model = stages.finetuning({"finetuning.epochs": 1})
    with pytest.raises(LeakageError, match="4 held-out utterances"):
        stages.evaluation(model, fold=2)


def test_a_model_says_what_it_was_fitted_on(stages, upstream):
    model = stages.finetuning({"finetuning.epochs": 1})
    assert sorted(model.fitted_on) == sorted(upstream.multitask.fitted_on) == sorted(stages.inputs.ids("S2", "S3"))


def test_a_fold_is_tested_on_the_held_out_session_alone(stages):
    predictions = stages.evaluation(stages.finetuning({"finetuning.epochs": 1}))
    assert pq.read_table(predictions)["id"].to_pylist() == stages.inputs.ids("S1")
    assert json.loads((predictions.parent / "metrics.json").read_text())["utterances"] == 4
