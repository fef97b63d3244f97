"""Presses that decide about all layers at once, when the last one has read the prompt."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import DynamicCache

from pikv_hf.integration.attachment import attachment_of
from pikv_hf.presses.base_press import LayerView, ObservingPress


@dataclass
class JointPress(ObservingPress):
    """Base of presses that divide one budget over the layers.

    Each layer's attention leaves its tokens with the press; the hook of the last layer decides for all of them. Up to
    then the cache holds the prompt as the model made it, which is what `DynamicCache` would hold.
    """

    _views: list[LayerView] = field(init=False, repr=False, default_factory=list)
    _last: int = field(init=False, repr=False, default=-1)

    def press_layers(self, views: list[LayerView]) -> None:
        """Compress all layers of a cache."""
        raise NotImplementedError

    def post_init_from_model(self, model: Any) -> None:
        """Attach the model, observe its queries, and find its last layer that is compressed."""
        super().post_init_from_model(model)
        attachment = attachment_of(model)
        assert attachment is not None
        modules = attachment.attention_modules()
        # Chunked attention tells its cache only that it is bounded.
        layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        full = [index for index, module in modules.items() if not slides(module) and not layers[index].is_sliding]
        if not full:
            raise ValueError(
                f"{type(self).__name__}: all layers of {type(model).__name__} slide; nothing can be compressed"
            )
        self._last = max(full)
        self._views = []

    def press_layer(self, view: LayerView, kwargs: dict[str, Any]) -> None:
        """Take a layer; with the last one, decide about all."""
        if self._views and self._views[-1].index >= view.index:
            # An earlier call did not come to its end.
            self._views = []
        self._views.append(view)
        if view.index == self._last:
            views, self._views = self._views, []
            self._check_unchanged(views)
            self.press_layers(views)
            interval = min(self.interval(each) for each in views)
            for each in views:
                super().done(each, interval)

    def _check_unchanged(self, views: list[LayerView]) -> None:
        for view in views:
            now = view.layer.get_seq_length()
            if now != view.stored.shape[-1]:
                raise ValueError(
                    f"{type(self).__name__} decides when all layers are read; meanwhile another press has changed "
                    f"layer {view.index} from {view.stored.shape[-1]} tokens to {now}. Put it last"
                )

    def done(self, view: LayerView, interval: int) -> None:
        """Let layers wait until the last one is read."""

    def leave(self) -> None:
        """End the block, and forget the layers of a call that did not come to its end."""
        super().leave()
        self._views = []


def slides(module: nn.Module) -> bool:
    """Return whether an attention layer sees a sliding window only, whose cache is bounded as it is."""
    return bool(getattr(module, "sliding_window", None) or getattr(module, "is_sliding", False))
