"""Turn a dense llama into a Mixtral that computes the same: every expert is the layer's own feed-forward network.

Sparse upcycling (arXiv 2212.05055) starts training from such a model. Here it is not trained: the weights of the chosen
experts add up to one, so whatever the router chooses the output is that of the dense network, with K and V of a real
model. The router is fitted, so that which expert a token goes to says something about the token.
"""

import torch
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

EXPERTS, CHOSEN = 8, 2

#: Of a llama's config, what a Mixtral's has by the same name.
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def upcycle(dense: LlamaForCausalLM, routers: torch.Tensor) -> MixtralForCausalLM:
    """Return a Mixtral of the same function; it shares the dense model's memory, also between its experts.

    Parameters
    ----------
    dense : LlamaForCausalLM
        In evaluation mode. Changing its weights changes those of all experts.
    routers : torch.Tensor
        `(L, E, hidden)`, the weights of each layer's router.

    Returns
    -------
    MixtralForCausalLM
        In evaluation mode, in the dense model's dtype, its logits equal up to rounding.

    Raises
    ------
    ValueError
        If there is not one router per layer.
    """
    given = dense.config
    if len(routers) != given.num_hidden_layers:
        raise ValueError(f"a model of {given.num_hidden_layers} layers needs as many routers, got {len(routers)}")
    config = MixtralConfig(
        **{name: getattr(given, name) for name in _SAME},
        num_local_experts=routers.shape[1],
        num_experts_per_tok=CHOSEN,
        sliding_window=None,
        attn_implementation=given._attn_implementation,
        dtype=dense.dtype,
    )
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    state = _state(dense, routers)
    unknown = model.load_state_dict(state, assign=True, strict=False)
    if unknown.unexpected_keys or set(unknown.missing_keys) - {"lm_head.weight"}:
        raise ValueError(f"this release's Mixtral has other weights: {unknown}")
    model.tie_weights()
    # Its frequencies are made with it, on the meta device, and are not in the state.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.generation_config = dense.generation_config
    return model.eval()


def _state(dense: LlamaForCausalLM, routers: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the weights by a Mixtral's names; experts are views of one."""
    state = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    experts = routers.shape[1]
    for index, layer in enumerate(dense.model.layers):
        mlp, at = layer.mlp, f"model.layers.{index}.mlp"
        gate_up = torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()])
        state[f"{at}.experts.gate_up_proj"] = gate_up.expand(experts, -1, -1)
        state[f"{at}.experts.down_proj"] = mlp.down_proj.weight.detach().expand(experts, -1, -1)
        state[f"{at}.gate.weight"] = routers[index].to(dense.dtype)
    return state
