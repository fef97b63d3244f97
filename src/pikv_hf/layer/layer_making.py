"""Making the layers of a cache, complete with their parts, schedulers and the tiers that they share."""

import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..common.transformers_release import warn_if_newer
from ..common.user_line import user_stacklevel
from ..config import JOINT, PiKVConfig
from ..distributed.device_layout import Devices, PartLayout
from ..scheduling.page_scheduler import make_scheduler, scheduler_name
from ..tiers.tier_limits import Tiers
from .indexed_layer import IndexedLayer
from .joint_budget import join_budgets
from .layer import PiKVLayer
from .layer_part import make_parts
from .model_link import ModelLink
from .own_layer import indexer_dims, layers_of

#: Options that change what pages hold, where they are, or which are read.
OF_PAGES = ("key_codec", "value_codec", "routing", "budget", "tiers")


def checked_options(config: Any, pikv_config: Any, single_options: dict[str, Any], attached: bool) -> PiKVConfig:
    """Return the options of a cache from what its constructor was given.

    Raises
    ------
    TypeError
        For what it does not take, with the call that does.
    ValueError
        For options that only an attached model can follow, if there is none.
    """
    if config is None:
        raise TypeError(
            "a cache is made by PiKVCache.for_model(model), or without attaching the model by PiKVCache(model.config)"
        )
    if isinstance(config, nn.Module):
        name = type(config).__name__
        raise TypeError(f"PiKVCache(...) takes a model's config; for a {name} use PiKVCache.for_model(model)")
    if not hasattr(config, "get_text_config"):
        raise TypeError(
            f"expected a model's config, got {config!r} ({type(config).__name__}); load the model, and use "
            "PiKVCache.for_model(model)"
        )
    if single_options:
        given = ", ".join(f"{name}={value!r}" for name, value in single_options.items())
        raise TypeError(
            f"PiKVCache(config) takes options as a PiKVConfig: PiKVCache(config, PiKVConfig({given})); "
            f"PiKVCache.for_model(model, {given}) takes them one by one"
        )
    warn_if_newer()
    options = PiKVConfig() if pikv_config is None else pikv_config
    if not isinstance(options, PiKVConfig):
        raise TypeError(f"pikv_config must be a PiKVConfig, got {type(options).__name__}")
    if not attached:
        _check_without_model(options)
    return options


def _check_without_model(options: PiKVConfig) -> None:
    """Raise `ValueError` for options of a cache made from a config alone that only an attached model can follow."""
    if options.placement in ("expert", "balanced"):
        raise ValueError(
            f'placement="{options.placement}" needs the model\'s routers: use PiKVCache.for_model(model), '
            'or placement="hash" with a config alone'
        )
    if options.budget is not None or options.routing != "all":
        given = f"budget={options.budget!r}" if options.budget is not None else f"routing={options.routing!r}"
        raise ValueError(
            f"{given} passes over tokens, which only PiKV's attention can do: use PiKVCache.for_model(model)"
        )


def check_has_pages(layers: Sequence[Any], options: PiKVConfig) -> None:
    """Say which options do nothing in a cache none of whose layers is kept in pages.

    Raises
    ------
    ValueError
        For a budget, which would not be kept to.

    Warns
    -----
    UserWarning
        For codecs, routing and tiers: results are right, and no byte is saved.
    """
    asked = {name: value for name, value in options.changed().items() if name in OF_PAGES}
    if not asked or any(isinstance(layer, PiKVLayer) for layer in layers):
        return
    windows = sorted({layer.sliding_window for layer in layers if type(layer) is DynamicSlidingWindowLayer})
    bounded = f", windows of {', '.join(map(str, windows))} tokens among them" if windows else ""
    help_ = '; sliding_layers="paged" would keep windows in pages' if windows else ""
    given = ", ".join(f"{name}={value!r}" for name, value in asked.items())
    why = f"is for layers that are kept in pages, and none of this model's {len(layers)} is{bounded}{help_}"
    if "budget" in asked:
        raise ValueError(f"{given} {why}")
    warnings.warn(f"{given} {why}: it changes nothing", stacklevel=user_stacklevel())


def effective_options(options: PiKVConfig, attached: bool, layers: Iterable[Any]) -> dict[str, Any]:
    """Return the options of a cache that are not at their defaults, and what those that depend on others come to.

    `layers` are its layers: whether they decide together what a budget keeps is known when they are made.
    """
    depending: dict[str, Any] = {"placement": options.placement or ("expert" if attached else "hash")}
    may_decide_jointly = any(getattr(layer, "decides_jointly", False) for layer in layers)
    if (scheduler := scheduler_name(options, may_decide_jointly)) is not None:
        depending["scheduler"] = scheduler
    return {**depending, **options.changed()}


def make_layers(
    config: Any,
    options: PiKVConfig,
    link: ModelLink | None,
    spread: Devices | PartLayout | None,
    lock: AbstractContextManager[Any],
) -> tuple[list[Any], Tiers | None]:
    """Return the layers of a cache, and the tiers that the paged ones among them share.

    Parameters
    ----------
    config : PreTrainedConfig
        The model's: there is a layer for each that `DynamicCache` would make, others than full attention as they are.
    options : PiKVConfig
        Of the cache.
    link : ModelLink, optional
        The attached model.
    spread : Devices or PartLayout, optional
        Where shards are, if not all where the layer's attention is.
    lock : context manager
        The lock of the cache.

    Raises
    ------
    ValueError
        For models as in :func:`~pikv_hf.layer.own_layer.layers_of`, and budgets that are too small.
    """
    layers = layers_of(config)
    dims = indexer_dims(config.get_text_config(decoder=True), layers)
    paged = [index for index, layer in enumerate(layers) if _is_paged(layer, options) or dims[index] is not None]
    layouts = {index: _layout_of(index, link, spread) for index in paged}
    parts = max((layout.parts for layout in layouts.values()), default=1)
    tiers = None if options.tiers is None else Tiers(options, max(1, len(layouts)) * parts)
    bounded = sum(getattr(layer, "sliding_window", 0) for index, layer in enumerate(layers) if index not in layouts)
    obstacle = _joint_obstacle(layouts, link, parts)
    if options.scheduler == JOINT and obstacle is not None:
        raise ValueError(f"scheduler={JOINT!r} decides by token and width, which cannot be done {obstacle}")
    for index, layout in layouts.items():
        if dims[index] is not None:
            _check_reads_chosen(index, options)
        slides = isinstance(layers[index], DynamicSlidingWindowLayer)
        if slides and not (_masks_windows(config) and (link is None or link.slides(index))):
            raise ValueError(
                f"layer {index} has a window of {layers[index].sliding_window} tokens in the cache alone, which its "
                'attention does not know of: sliding_layers="paged" would show it more; use "bounded"'
            )
        groups = 1 if link is None else link.query_groups(index)
        latent = link is not None and link.caches_latents(index) and dims[index] is None
        schedulers = [
            make_scheduler(
                options, len(layouts), bounded, parts, layout.fraction(location.number), groups, obstacle is None
            )
            for location in layout.locations
        ]
        made = make_parts(index, options, layout, schedulers, tiers, latent)
        kind = IndexedLayer if dims[index] else PiKVLayer
        layers[index] = kind(index, options, link, layout, made, index == min(layouts), dims[index] or 0)
        layers[index].store.lock = lock
    join_budgets(layers)
    return layers, tiers


def _joint_obstacle(layouts: dict[int, PartLayout], link: ModelLink | None, parts: int) -> str | None:
    """Return why the layers of a cache cannot decide together what they keep, None if they can."""
    if link is None:
        return "without an attached model"
    if parts > 1:
        return f"over {parts} devices or processes"
    if latent := [index for index in layouts if link.caches_latents(index)]:
        return f"for latents, as layer {latent[0]} has"
    return None


def _masks_windows(config: Any) -> bool:
    """Return whether a model's file has a name for masks of windows or chunks, as far as it is loaded.

    On 5.2 Moshi's cache has windows, and its attention sees all that it is given.
    """
    kind = type(config.get_text_config(decoder=True))
    code = sys.modules.get(kind.__module__.replace("configuration_", "modeling_"))
    return code is None or any("sliding" in name or "chunked" in name for name in vars(code))


def _check_reads_chosen(index: int, options: PiKVConfig) -> None:
    """Refuse options that choose tokens where an indexer of the model's own does."""
    if options.routing != "all" or options.budget is not None:
        given = f"routing={options.routing!r}" if options.routing != "all" else f"budget={options.budget!r}"
        raise ValueError(
            f"layer {index} reads the tokens that an indexer of the model's own chooses among all of them; {given} "
            "would choose again: codecs, tiers and devices are what such a layer can have"
        )


def _is_paged(layer: Any, options: PiKVConfig) -> bool:
    """Return whether a layer of `DynamicCache` is replaced by a paged one."""
    slides = type(layer) is DynamicSlidingWindowLayer
    return type(layer) is DynamicLayer or (slides and options.sliding_layers == "paged")


def _layout_of(index: int, link: ModelLink | None, spread: Devices | PartLayout | None) -> PartLayout:
    """Return where the parts of a layer are."""
    if isinstance(spread, Devices):
        assert link is not None
        return spread.around(link.attention_device(index))
    return PartLayout() if spread is None else spread
