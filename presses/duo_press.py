"""DuoAttention: retrieval heads keep everything, streaming heads sinks and recent tokens."""

import json
import logging
import math
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pikv_hf.presses.base_press import LayerView, ObservingPress
from pikv_hf.presses.retrieval_heads import HeadScores, find_head_scores, layers_and_heads

logger = logging.getLogger(__name__)

#: The file in a model's folder.
FILE_NAME = "pikv_duo_heads.json"


@dataclass
class DuoPress(ObservingPress):
    """Streaming heads keep sinks and recent tokens only; heads that look things up keep all (arXiv 2410.10819).

    Which heads do is found once per model, on text in which a random passkey has to be found again, by
    :func:`~pikv_hf.presses.retrieval_heads.find_head_scores`; no download and no training. The scores are kept in
    `pikv_duo_heads.json` next to the model if it is in a folder that can be written, and read from there. The heads of
    the lowest scores stream, as many as the budget asks for.

    Parameters
    ----------
    compression_ratio, budget, sink_tokens
        As in :class:`ObservingPress`.
    recent_tokens : int
        What a streaming head keeps of the latest tokens.
    head_scores : str or Path, optional
        A file of scores instead of the one next to the model.

    Raises
    ------
    ValueError
        For arguments out of range, scores of another model, and an unreadable file.
    """

    recent_tokens: int = 64
    head_scores: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent_tokens < 1:
            raise ValueError(f"recent_tokens must be at least 1, got {self.recent_tokens}")
        self._scores: HeadScores | None = None
        self._scored: weakref.ref[Any] | None = None

    def post_init_from_model(self, model: Any) -> None:
        """Attach the model and read its head scores, or find and save them."""
        if self._scored is None or self._scored() is not model:
            self._scores, self._scored = scores_of(model, self.head_scores), weakref.ref(model)
        super().post_init_from_model(model)

    @property
    def ragged(self) -> bool:
        """Whether layers keep different numbers of tokens: those of many streaming heads do."""
        return True

    def streaming(self, view: LayerView) -> torch.Tensor:
        """Return which of the layer's KV heads stream in which row, `(B, H)` bool."""
        seen = zip(self.tokens_seen(view), self.kept_shares(view), strict=True)
        return torch.stack([self._streaming(view.index, *row) for row in seen]).to(view.stored.device)

    def _streaming(self, layer: int, tokens: int, share: float) -> torch.Tensor:
        assert self._scores is not None
        short = min(tokens, self.sink_tokens + self.recent_tokens)
        flat = self._scores.flat()
        # With n of N heads streaming the share kept is 1 - n / N * (1 - short / tokens).
        wanted = len(flat) * (1 - share) / max(1 - short / tokens, 1e-9) if tokens else 0.0
        number = min(len(flat), math.ceil(wanted - 1e-6))
        if wanted > len(flat) + 1e-6:
            logger.warning_once(  # type: ignore[attr-defined]
                f"DuoPress: {share:.1%} of {tokens} tokens is less than {short} sink and recent tokens of every head; "
                "all heads stream, and the budget is exceeded"
            )
        return self._scores.lowest(number, layer)

    def press_layer(self, view: LayerView, kwargs: dict[str, Any]) -> None:
        """Keep sinks and recent tokens of streaming heads, everything of the others."""
        rank = view.stored.any(dim=1).cumsum(dim=-1)
        column = torch.arange(view.stored.shape[-1], device=view.stored.device)
        near = (rank <= self.sink_tokens) | (column >= view.stored.shape[-1] - self.recent_tokens)
        self.evict(view, view.stored & (near[:, None] | ~self.streaming(view)[:, :, None]))


def scores_of(model: Any, path: str | Path | None) -> HeadScores:
    """Read a model's head scores from `path` or from next to the model; find and save them if there are none.

    Raises
    ------
    ValueError
        If the file is not one of head scores, or of a model of other layers and heads.
    """
    folder = Path(str(getattr(model.config, "name_or_path", "") or "nowhere"))
    file = Path(path) if path is not None else folder / FILE_NAME
    if file.is_file():
        try:
            scores = HeadScores.from_dict(json.loads(file.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} holds no head scores: {error}") from error
        if not scores.fits(model):
            raise ValueError(
                f"{file} is of a {scores.model_type} model with {scores.shape()} layers and KV heads, but "
                f"{type(model).__name__} has {' x '.join(map(str, layers_and_heads(model)))}"
            )
        return scores
    if path is not None and not file.parent.is_dir():
        raise ValueError(f"head scores cannot be written to {file}: there is no folder {file.parent}")
    scores = find_head_scores(model)
    if path is not None or folder.is_dir():
        try:
            file.write_text(json.dumps(scores.to_dict(), indent=1) + "\n")
        except OSError as error:
            logger.warning("head scores are not saved: %s", error)
    return scores
