"""Every press that kvpress exports, small enough for tiny models and without a network."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import kvpress
import numpy as np
import pytest
import torch
from families import FAMILIES
from kvpress.presses.fastkvzip_press import FastKVzipGate
from kvpress.presses.kvzap_press import KVzapConfig, KVzapModel
from peft import LoraConfig
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

import pikv_hf.presses  # noqa: F401  Adapts kvpress to the release of transformers.
from pikv_hf.eval.reference.load import reference_model_path
from pikv_hf.eval.tasks import reference

VOCAB = 953
#: The families of `families.py` that every press runs on: one that kvpress lists as supported, one it does not.
ARCHITECTURES = ("llama", "qwen3_moe")

#: Presses that are exported and cannot run, and why.
LEFT_OUT = {
    "BasePress": "an abstract class: compress() raises NotImplementedError",
    "ScorerPress": "an abstract class: score() raises NotImplementedError",
}

Factory = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class PressCase:
    """A press and what it asks of the caller.

    Attributes
    ----------
    press : str
        The class, as kvpress exports it.
    make : callable
        Returns a new press for a model and its tokenizer. What the press would download is given to it instead: random
        numbers of the right shape, the same at every call.
    variant : str
        Tells cases of one class apart.
    attention : {"sdpa", "eager"}
        The attention implementation that the press needs.
    ragged_layers : bool
        Layers keep different numbers of tokens, so that `DynamicCache` takes no question of several tokens.
    head_wise : bool
        Evicts by `module.masked_key_indices`, which frees nothing in a `DynamicCache`.
    decodes : bool
        Evicts while it decodes, so that kvpress allows one question.
    changes_model : bool
        Adds weights to the model.
    after_prefill : bool
        Evicts when its `with` block ends, or counts on the pipeline's calls: not made for `generate`.
    random : bool
        Draws from torch's generator.
    changes_tokens : bool
        Changes keys or values instead of only picking some.
    in_context : str
        What the context has to end with.
    """

    press: str
    make: Factory
    variant: str = ""
    attention: str = "sdpa"
    ragged_layers: bool = False
    head_wise: bool = False
    decodes: bool = False
    changes_model: bool = False
    after_prefill: bool = False
    random: bool = False
    changes_tokens: bool = False
    in_context: str = ""

    @property
    def id(self) -> str:
        return f"{self.press}-{self.variant}" if self.variant else self.press


def exported_presses() -> list[str]:
    """Return the names of all press classes that kvpress exports."""
    members = ((name, getattr(kvpress, name)) for name in kvpress.__all__)
    return [name for name, member in members if inspect.isclass(member) and issubclass(member, kvpress.BasePress)]


def build_model(architecture: str, attention: str = "sdpa", **options: Any) -> Any:
    """Return a tiny random model, the same at every call, that finds its tokenizer where KVzip looks for it."""
    model = FAMILIES[architecture].build(vocab_size=VOCAB, head_dim=64, **options)
    model.config.name_or_path = str(reference_model_path())
    model.set_attn_implementation(attention)
    return model


def context_and_question(length: int, task: str = "niah_single_2") -> tuple[str, str]:
    """Return a text of about `length` tokens and a question of several."""
    [sample] = reference.generate(length, 1, tasks=[task])
    return sample.context, sample.question


def _numbers(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _scorer(ratio: float = 0.5) -> Any:
    return kvpress.SnapKVPress(ratio, window_size=16)


def _simple(name: str, *arguments: Any, **options: Any) -> Factory:
    return lambda model, tokenizer: getattr(kvpress, name)(*arguments, **options)


def _around(name: str, scorer: Callable[[], Any] = _scorer, **options: Any) -> Factory:
    return lambda model, tokenizer: getattr(kvpress, name)(scorer(), **options)


def _composed(model: Any, tokenizer: Any) -> Any:
    return kvpress.ComposedPress([_scorer(0.3), kvpress.ThinKPress(0.25, window_size=16)])


def _per_layer(model: Any, tokenizer: Any) -> Any:
    ratios = np.linspace(0.3, 0.7, model.config.num_hidden_layers).tolist()
    return kvpress.PerLayerCompressionPress(kvpress.KnormPress(), ratios)


def _prefill_decoding(model: Any, tokenizer: Any) -> Any:
    return kvpress.PrefillDecodingPress(_scorer(), _decoding("DecodingPress", target_size=90)(model, tokenizer))


def _decoding(name: str, **options: Any) -> Factory:
    return _around(name, kvpress.KnormPress, compression_interval=3, **options)


def _duo(model: Any, tokenizer: Any) -> Any:
    config = model.config
    press = kvpress.DuoAttentionPress(head_compression_ratio=0.5)
    scores = np.random.default_rng(5).random((config.num_hidden_layers, config.num_key_value_heads))
    press.load_attention_pattern = lambda model: (4, 16, scores)
    return press


def _expected_attention_stats(model: Any, tokenizer: Any) -> Any:
    config = model.config
    press = kvpress.ExpectedAttentionStatsPress(0.5)
    shape = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    factor = _numbers(*shape, config.head_dim, seed=6)
    press.mu, press.cov = _numbers(*shape), factor @ factor.mT / config.head_dim
    return press


def _q_filter(model: Any, tokenizer: Any) -> Any:
    config = model.config
    press = kvpress.QFilterPress(0.5)
    filters = _numbers(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    press.load_q_filters = lambda name: filters
    return press


def _lukv(model: Any, tokenizer: Any) -> Any:
    config = model.config
    press = kvpress.LUKVPress(compression_ratio=0.5)
    offsets = np.random.default_rng(5).uniform(-0.2, 0.2, (config.num_hidden_layers, config.num_key_value_heads))
    press._budget_curves = np.clip(np.linspace(0.01, 0.99, 99)[:, None, None] + offsets, 0, 1)
    return press


def _kvzap(model: Any, tokenizer: Any, ratio: float = 0.5) -> Any:
    config = model.config
    press = kvpress.KVzapPress(ratio, model_type="linear")
    press.kvzap_model_name = f"nvidia/KVzap-linear-{config.name_or_path.split('/')[-1]}"
    shape = {"input_dim": config.hidden_size, "output_dim": config.num_key_value_heads}
    press.kvzap_model = KVzapModel(KVzapConfig(**shape, n_modules=config.num_hidden_layers))
    _randomise(press.kvzap_model, 0.2)
    return press


def _kvzap_dms(model: Any, tokenizer: Any) -> Any:
    return kvpress.DMSPress(_kvzap(model, tokenizer), threshold=0.0, sliding_window_size=16, decoding=True)


def _fast_kvzip(model: Any, tokenizer: Any) -> Any:
    config = model.config
    heads, groups = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    press = kvpress.FastKVzipPress(0.5)
    press.gates = [
        FastKVzipGate(index, config.hidden_size, heads, groups, torch.float32)
        for index in range(config.num_hidden_layers)
    ]
    _randomise(torch.nn.ModuleList(press.gates), 0.5)
    return press


def _restore_kv(model: Any, tokenizer: Any) -> Any:
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except (ValueError, ImportError) as error:
        pytest.skip(f"RestoreKVPress adds an adapter to the model, for which transformers asks: {error}")
    press = kvpress.RestoreKVPress(0.5, chunk_size=100)
    press.restore_model_name = f"higokri/RestoreKV-{model.config.name_or_path.split('/')[-1]}"
    press.restore_embeddings = _numbers(8, model.config.hidden_size)
    if not getattr(model, "peft_config", None):
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), adapter_name=press.adapter_name)
        _randomise(model, 0.2, only="lora_")
        model.disable_adapters()
    return press


def _finch(model: Any, tokenizer: Any) -> Any:
    press = kvpress.FinchPress(0.5)
    # A delimiter that the vocabulary has already, so that the model need not grow.
    press.update_model_and_tokenizer(model, tokenizer, tokenizer.unk_token)
    return press


@torch.no_grad()
def _randomise(module: torch.nn.Module, scale: float, only: str = "") -> None:
    for index, (name, parameter) in enumerate(module.named_parameters()):
        if only in name:
            parameter.copy_(_numbers(*parameter.shape, seed=index) * scale)


def _half_at_random() -> Any:
    return kvpress.RandomPress(0.5, seed=3)


def _sinks_and_recent() -> Any:
    return kvpress.StreamingLLMPress(0.5)


def _key_difference() -> Any:
    return kvpress.KeyDiffPress(0.5)


#: Half of all uniform scores are below the threshold.
_DMS = {"threshold": 0.5, "sliding_window_size": 16}

CASES = (
    PressCase("AdaKVPress", _around("AdaKVPress"), head_wise=True),
    PressCase("BlockPress", _around("BlockPress", _key_difference, block_size=32)),
    PressCase(
        "CAMPress",
        _decoding("CAMPress", target_size=90, merge_budget=4),
        decodes=True,
        random=True,
        changes_tokens=True,
    ),
    PressCase("CapPress", _simple("CapPress", 0.5)),
    PressCase("ChunkKVPress", _around("ChunkKVPress")),
    PressCase("ChunkPress", _around("ChunkPress", _key_difference, chunk_length=64)),
    PressCase("CompactorPress", _simple("CompactorPress", 0.5), random=True),
    PressCase("ComposedPress", _composed, changes_tokens=True),
    PressCase(
        "CompressionRatioDecodingPress",
        _decoding("CompressionRatioDecodingPress", target_compression_ratio=0.6),
        decodes=True,
    ),
    PressCase("CriticalAdaKVPress", _around("CriticalAdaKVPress"), head_wise=True),
    PressCase("CriticalKVPress", _around("CriticalKVPress")),
    PressCase("CURPress", _simple("CURPress", 0.5)),
    PressCase("CURPress", _simple("CURPress", 0.5, use_random_leverage=True), "random", random=True),
    PressCase("DecodingPress", _decoding("DecodingPress", target_size=90), decodes=True),
    PressCase("DMSPress", _around("DMSPress", _half_at_random, **_DMS), head_wise=True),
    PressCase(
        "DMSPress",
        _around("DMSPress", _half_at_random, decoding=True, **_DMS),
        "decoding",
        head_wise=True,
        decodes=True,
    ),
    PressCase("DuoAttentionPress", _duo, head_wise=True),
    PressCase("EntropyGatedChunkKVPress", _around("EntropyGatedChunkKVPress")),
    PressCase("ExpectedAttentionPress", _simple("ExpectedAttentionPress", 0.5)),
    PressCase("ExpectedAttentionStatsPress", _expected_attention_stats),
    PressCase("FastKVzipPress", _fast_kvzip, head_wise=True, after_prefill=True),
    PressCase(
        "FinchPress",
        _finch,
        after_prefill=True,
        changes_tokens=True,
        in_context="<unk> What is the special magic number?",
    ),
    PressCase("KeyDiffPress", _simple("KeyDiffPress", 0.5)),
    PressCase("KeyRerotationPress", _around("KeyRerotationPress", _sinks_and_recent), changes_tokens=True),
    PressCase("KnormPress", _simple("KnormPress", 0.5)),
    PressCase(
        "KVComposePress", _simple("KVComposePress", compression_ratio=0.5), ragged_layers=True, after_prefill=True
    ),
    PressCase(
        "KVComposePress",
        _simple("KVComposePress", structured=False, compression_ratio=0.5),
        "unstructured",
        head_wise=True,
        after_prefill=True,
    ),
    PressCase("KVgradPress", _simple("KVgradPress", 0.5, chunk_size=100), head_wise=True, after_prefill=True),
    PressCase("KVzapPress", _kvzap),
    PressCase("KVzapPress", _kvzap_dms, "dms", head_wise=True, decodes=True),
    PressCase("KVzipPress", _simple("KVzipPress", 0.5, chunk_size=100), head_wise=True, after_prefill=True),
    PressCase(
        "KVzipPress",
        _simple("KVzipPress", 0.5, chunk_size=200, layerwise=True, kvzip_plus_normalization=True),
        "plus",
        head_wise=True,
        after_prefill=True,
    ),
    PressCase("LagKVPress", _simple("LagKVPress", 0.5, lag_size=32)),
    PressCase("LeverageScorePress", _simple("LeverageScorePress", 0.5), random=True),
    PressCase("LUKVPress", _lukv, head_wise=True),
    PressCase("MergingPress", _around("MergingPress"), changes_tokens=True),
    PressCase("NonCausalAttnPress", _simple("NonCausalAttnPress", 0.5)),
    PressCase("ObservedAttentionPress", _simple("ObservedAttentionPress", 0.5), attention="eager"),
    PressCase("PerLayerCompressionPress", _per_layer, ragged_layers=True),
    PressCase("PrefillDecodingPress", _prefill_decoding, decodes=True),
    PressCase("PyramidKVPress", _simple("PyramidKVPress", 0.5, window_size=16), ragged_layers=True),
    PressCase("QFilterPress", _q_filter),
    PressCase("RandomPress", _simple("RandomPress", 0.5), random=True),
    PressCase("RestoreKVPress", _restore_kv, head_wise=True, changes_model=True, after_prefill=True),
    PressCase("SimLayerKVPress", _simple("SimLayerKVPress", lazy_threshold=0.3, n_recent=64), ragged_layers=True),
    PressCase("SnapKVPress", _simple("SnapKVPress", 0.5, window_size=16)),
    PressCase("StreamingLLMPress", _simple("StreamingLLMPress", 0.5)),
    PressCase("ThinKPress", _simple("ThinKPress", 0.5, window_size=16), changes_tokens=True),
    PressCase("TOVAPress", _simple("TOVAPress", 0.5)),
)
