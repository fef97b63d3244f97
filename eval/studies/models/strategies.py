"""Ways to generate, each with the cache that a caller makes: what they return is compared between two caches."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pikv_hf import PiKVCache
from pikv_hf.common.transformers_release import CACHE_ARGUMENT, cache_argument
from pikv_hf.eval.studies.models.tiny_models import VOCAB

#: Makes a cache; None leaves it to the model.
Make = Callable[[], Any]
#: Tokens and logits.
Seen = list[torch.Tensor]
Strategy = Callable[[Any, Make], Seen]

PADDING, PROMPT, NEW = 9, 30, 6


def tokens(count: int, batch: int, seed: int) -> torch.Tensor:
    """Return random `(batch, count)` int64 token ids."""
    return torch.randint(2, VOCAB, (batch, count), generator=torch.Generator().manual_seed(seed))


def prompt(batch: int = 2) -> dict[str, torch.Tensor]:
    """Return a left-padded batch, of which the first row is padded; one row alone is not."""
    ids = tokens(PROMPT, batch, 1)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :PADDING] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, torch.Tensor], cache: Any, new: int = NEW, **options: Any) -> Any:
    """Generate with a cache, or with what the model makes by itself; returns the output with logits."""
    given = {} if cache is None else cache_argument(cache)
    defaults = {"do_sample": False, "pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**inputs, **given, max_new_tokens=new, **{**defaults, **options})


def greedy(model: Any, make: Make) -> Seen:
    """One row."""
    out = generate(model, prompt(1), make())
    return [out.sequences, *out.logits]


def padded(model: Any, make: Make) -> Seen:
    """A left-padded batch."""
    out = generate(model, prompt(3), make())
    return [out.sequences, *out.logits]


def beams(model: Any, make: Make) -> Seen:
    """Three beams for each of two rows."""
    return [generate(model, prompt(), make(), num_beams=3).sequences]


def sampling(model: Any, make: Make) -> Seen:
    """Two samples for each row, with one seed."""
    torch.manual_seed(5)
    out = generate(model, prompt(), make(), do_sample=True, num_return_sequences=2, top_k=20)
    return [out.sequences, *out.logits]


def chunks(model: Any, make: Make) -> Seen:
    """A prompt read in chunks."""
    out = generate(model, prompt(1), make(), prefill_chunk_size=13)
    return [out.sequences, *out.logits]


def second_turn(model: Any, make: Make) -> Seen:
    """A padded batch goes on with further tokens."""
    first = generate(model, prompt(), make())
    return _goes_on(model, first.sequences, getattr(first, CACHE_ARGUMENT))


def lookup(model: Any, make: Make) -> Seen:
    """Drafts are looked up in a prompt that repeats itself."""
    ids = tokens(12, 1, 3).repeat(1, 3)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # An end that is never produced: 5.2 asks for one.
    out = generate(model, inputs, make(), 10, prompt_lookup_num_tokens=3, eos_token_id=VOCAB)
    return [out.sequences]


def saved(model: Any, make: Make) -> Seen:
    """A saved and loaded cache goes on."""
    first = generate(model, prompt(), make())
    cache = getattr(first, CACHE_ARGUMENT)
    if isinstance(cache, PiKVCache):
        with tempfile.TemporaryDirectory() as folder:
            cache.save(Path(folder) / "cache.safetensors")
            cache = PiKVCache.load(Path(folder) / "cache.safetensors", model)
    return _goes_on(model, first.sequences, cache)


def fork(model: Any, make: Make) -> Seen:
    """A fork and what it was made of go on in different ways."""
    first = generate(model, prompt(), make())
    cache = getattr(first, CACHE_ARGUMENT)
    other = cache.fork() if isinstance(cache, PiKVCache) else copy.deepcopy(cache)
    return [*_goes_on(model, first.sequences, other, 7), *_goes_on(model, first.sequences, cache, 8)]


def _goes_on(model: Any, sequences: torch.Tensor, cache: Any, seed: int = 2) -> Seen:
    ids = torch.cat([sequences, tokens(7, len(sequences), seed)], dim=1)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    out = generate(model, {"input_ids": ids, "attention_mask": mask}, cache, 3)
    return [out.sequences, *out.logits]


#: By the names of docs/models.md.
STRATEGIES: dict[str, Strategy] = {
    **{"greedy": greedy, "padded batch": padded, "beams": beams, "sampling": sampling, "chunked prefill": chunks},
    **{"second turn": second_turn, "prompt lookup": lookup, "save and load": saved, "fork": fork},
}
