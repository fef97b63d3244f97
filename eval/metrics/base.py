"""What all metrics share: a score in [0, 1] per answer, and `evaluate`'s interface around the mean."""

from collections.abc import Sequence
from typing import Any

import evaluate
from datasets import Features, Value
from datasets import Sequence as ListOf

_FEATURES = Features({"predictions": Value("string"), "references": ListOf(Value("string"))})
_INPUTS = "predictions: one answer per sample. references: a list of right answers per sample."


class SampleMetric(evaluate.Metric):
    """A metric that is the mean of a score per sample.

    Nothing is written to disk or read from the Hub, so any number of processes may hold the same metric.

    Parameters
    ----------
    name : str
        Key of the result.
    description : str
        The score in one sentence.
    citation : str
        Where the definition comes from.
    """

    def __init__(self, name: str, description: str, citation: str) -> None:
        self._key, self._description, self._citation = name, description, citation
        super().__init__(keep_in_memory=True, seed=0)

    @property
    def key(self) -> str:
        """Name of the score, in the registry and in results."""
        return self._key

    def score(self, prediction: str, references: Sequence[str], *, all_classes: Sequence[str] | None = None) -> float:
        """Score one answer.

        Parameters
        ----------
        prediction : str
            What the model wrote; never interpreted.
        references : sequence of str
            Right answers, at least one.
        all_classes : sequence of str, optional
            Labels of a classification task; the other metrics do not look at it.

        Returns
        -------
        float
            In [0, 1].

        Raises
        ------
        TypeError
            If `prediction` is no text, or `references` is a single one instead of a list.
        ValueError
            If there is no reference, or the metric cannot use one.
        """
        if not isinstance(prediction, str):
            raise TypeError(f"{self.key}: a prediction must be a str, got {type(prediction).__name__}")
        if isinstance(references, str) or not all(isinstance(reference, str) for reference in references):
            raise TypeError(f"{self.key}: references must be a list of str, got {references!r}")
        if not references:
            raise ValueError(f"{self.key}: expected at least one reference, got none")
        return self._score(prediction, references, all_classes)

    def _score(self, prediction: str, references: Sequence[str], all_classes: Sequence[str] | None) -> float:
        """Return the best score over the references."""
        return max(self._compare(prediction, reference, all_classes) for reference in references)

    def _compare(self, prediction: str, reference: str, all_classes: Sequence[str] | None) -> float:
        """Return the score against one reference."""
        raise NotImplementedError

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        all_classes: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """Return the mean score in percent, not rounded; called by `compute`."""
        if not predictions:
            raise ValueError(f"{self.key}: expected at least one prediction, got none")
        pairs = zip(predictions, references, strict=True)
        scores = [self.score(prediction, answers, all_classes=all_classes) for prediction, answers in pairs]
        return {self.key: 100 * sum(scores) / len(scores)}

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description=self._description,
            citation=self._citation,
            inputs_description=_INPUTS,
            features=_FEATURES,
        )

    def _build_data_dir(self) -> str:
        # evaluate makes a cache folder here, although all is kept in memory.
        return ""
