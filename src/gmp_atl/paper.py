"""The figures that the paper publishes, so that every table can show them beside a run's own.

All are of the complete IEMOCAP with four classes, each session held out by itself, and of HuBERT base. UAR and WAR are
in percent.
"""

from __future__ import annotations

from dataclasses import dataclass

READER = "iemocap"
"""Of the config, for the corpus that the paper evaluates on."""
ENCODER = "facebook/hubert-base-ls960"
"""On the hub, whose pre-trained HuBERT the paper takes (Sec. 4.1.2)."""
ENCODER_SHA256 = "062249fffb353eab67547a2fbc129f7c31a2f459faf641b19e8fb007cc5c48ad"
"""Of its weights, wherever they lie."""
LAYER = -3
"""Printed on every row of Table 3, those without GMPs included."""


@dataclass(frozen=True)
class ClassSize:
    """A row of Table 1."""

    utterances: int
    minutes: int


@dataclass(frozen=True)
class Score:
    """Mean over the five folds; None where the paper prints a dash."""

    uar: float | None
    war: float | None

    def of(self, measure: str) -> float | None:
        """UAR or WAR."""
        return {"UAR": self.uar, "WAR": self.war}[measure]

    def minus(self, other: Score, measure: str) -> float:
        """Difference in points of UAR or WAR, which both must have."""
        own, theirs = self.of(measure), other.of(measure)
        assert own is not None, f"a row without {measure}"
        assert theirs is not None, f"a row without {measure}"
        return own - theirs


@dataclass(frozen=True)
class System:
    """A row of Table 2."""

    name: str
    reference: int
    """Number in the paper's list of references."""
    modalities: str
    score: Score


TABLE_1 = {
    "angry": ClassSize(1103, 83),
    "happy": ClassSize(1636, 126),
    "neutral": ClassSize(1708, 111),
    "sad": ClassSize(1084, 99),
}
TABLE_1_TOTAL = ClassSize(5531, 419)

TABLE_2 = (
    System("TCSER", 22, "A", Score(66.9, 65.4)),
    System("Wav2vec2-PT", 31, "A", Score(None, 67.2)),
    System("Joint Network", 17, "A", Score(73.3, 72.5)),
    System("TAP", 13, "A", Score(74.2, None)),
    System("P-TAPT", 12, "A", Score(74.3, None)),
    System("BAS", 26, "A", Score(75.0, 74.3)),
    System("UDA", 14, "A", Score(77.8, 77.4)),
    System("MF-WavBERT", 32, "A + T", Score(76.3, None)),
    System("KS-Transformer", 33, "A + T", Score(75.3, 74.3)),
    System("BAM", 34, "A + T", Score(77.0, 75.5)),
    System("Bi-modal", 35, "A + T", Score(78.5, 77.7)),
    System("W2B-CA-Aux", 36, "A + T", Score(79.7, 78.4)),
    System("MMER", 37, "A + T", Score(None, 81.2)),
    System("GEmo-CLAP", 16, "A + T", Score(83.2, 81.4)),
)
"""Systems that the paper compares itself with; A is audio, T is text."""

GMP_ATL = Score(82.0, 80.0)
"""The paper's own row of Table 2."""

TABLE_3 = {
    (False, "ce"): Score(78.0, 75.8),
    (False, "ams"): Score(79.8, 77.6),
    (True, "ce"): Score(80.2, 78.4),
    (True, "ams"): Score(82.0, 80.0),
}
"""(with GMPs?, loss): score."""

TABLE_4 = {
    -1: Score(80.4, 79.0),
    -2: Score(80.2, 79.7),
    -3: Score(82.0, 80.0),
    -4: Score(81.9, 79.7),
    -5: Score(80.6, 78.6),
    -6: Score(80.6, 78.1),
    -7: Score(81.2, 79.5),
    -8: Score(80.6, 79.3),
}
"""Layer of the GMPs: score, with AM-Softmax."""
