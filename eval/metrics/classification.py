"""LongBench's rule for labels: the right one must be named, and every other one named takes its share.

Source: LongBench (Bai et al., 2023), `metrics.py`.
"""

from collections.abc import Sequence

from pikv_hf.eval.metrics.base import SampleMetric


class Classification(SampleMetric):
    """1 over the number of labels that the answer names, if the right one is among them, else 0.

    A label that is part of the right one, such as `number` in `other number`, is named along with it and does not
    count. LongBench's script removes these labels from a list while it walks through it and so never looks at the label
    after a removed one. That is kept (see `named_labels`), since the published figures contain it. It only matters if
    two neighbours in the order of `all_classes` are both parts of the right label; the score is then lower.
    """

    def __init__(self) -> None:
        super().__init__(
            "classification", "Share of the right label among the labels named.", "Bai et al., LongBench, 2023"
        )

    def _compare(self, prediction: str, reference: str, all_classes: Sequence[str] | None) -> float:
        if not all_classes:
            raise ValueError(f"classification: expected the labels of the task as all_classes, got {all_classes!r}")
        labels = named_labels(prediction, reference, all_classes)
        return 1 / len(labels) if reference in labels else 0.0


def named_labels(prediction: str, reference: str, all_classes: Sequence[str]) -> list[str]:
    """Return the labels named in the answer, less parts of the right label, except after a label left out."""
    kept: list[str] = []
    passes = False
    for label in (label for label in all_classes if label in prediction):
        if not passes and label in reference and label != reference:
            passes = True
        else:
            kept.append(label)
            passes = False
    return kept
