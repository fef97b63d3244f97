"""What the code of an attention says of the tokens that it caches: latents, what they are expanded to, or neither."""

import inspect
import linecache
import textwrap
from typing import Any

import pytest
from families import FAMILIES
from torch import nn

from pikv_hf.integration.latent_attention import expands_latents
from pikv_hf.integration.latent_code import caches_expanded_latents

if any(expands_latents(type(module)) for module in FAMILIES["deepseek_v3"].build().modules()):
    pytest.skip("this transformers caches latents itself", allow_module_level=True)


def altered(kind: type[nn.Module], was: str, becomes: str) -> type[nn.Module]:
    """Return a class of attention with other code, which has source."""
    source = textwrap.dedent(inspect.getsource(kind.forward))
    assert was in source
    source, file = source.replace(was, becomes), f"<altered {becomes}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    found: dict[str, Any] = {}
    exec(compile("from __future__ import annotations\n" + source, file, "exec"), vars(inspect.getmodule(kind)), found)
    linecache.cache[file] = (len(source), None, ["\n", *source.splitlines(keepends=True)], file)
    return type(kind.__name__, (kind,), {"forward": found["forward"]})


@pytest.mark.parametrize(
    ("was", "becomes", "expected"),
    [
        ("q_states", "queries", True),
        ("self.kv_b_proj(", "2 * self.kv_b_proj(", False),
        ("torch.cat((k_pass, k_rot), dim=-1)", "torch.cat((k_rot, k_pass), dim=-1)", False),
        ("batch_size, 1, seq_length, self.qk", "batch_size, -1, seq_length, self.qk", False),
        ("past_key_values.update(key_states, value", "past_key_values.update(2 * key_states, value", False),
        ("[self.qk_nope_head_dim, self.v_head_dim]", "[self.v_head_dim, self.qk_nope_head_dim]", False),
    ],
)
def test_code_tells_what_is_cached(was: str, becomes: str, expected: bool) -> None:
    kind = next(type(each) for each in FAMILIES["deepseek_v3"].build().modules() if caches_expanded_latents(type(each)))
    assert caches_expanded_latents(altered(kind, was, becomes)) is expected
