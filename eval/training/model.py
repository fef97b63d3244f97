"""The reference model before training, its optimizers and its load-balancing loss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pikv_hf.eval.training.muon import Muon

ADAM_LEARNING_RATE = 2e-3
NORM_FACTOR = 5.0  # q_norm and k_norm set how sharp attention can be; they learn faster than the rest
QK_NORM_INIT = 1.25


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3MoeForCausalLM:
    """The untrained reference model: 4 layers, 8 experts of which 2 are used per token, about 2.1M parameters."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        intermediate_size=128,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    # A loop over experts is faster than grouped matrix products in fp32 on a CPU.
    model = Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation="eager")
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            nn.init.constant_(parameter, QK_NORM_INIT)
    return model


def build_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers except router gates, AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    norms: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            norms.append(parameter)
        elif ".layers." in name and parameter.ndim >= 2 and "mlp.gate." not in name:
            matrices.append(parameter)
        else:
            rest.append(parameter)
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": norms, "lr": NORM_FACTOR * ADAM_LEARNING_RATE}]
    adam = torch.optim.AdamW(
        groups,
        lr=ADAM_LEARNING_RATE,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        foreach=True,
    )
    return [Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01), adam]


def balance_loss(hidden: Tensor, weight: Tensor, top_k: int) -> Tensor:
    """Switch load-balancing loss of one router (Fedus et al., 2021, section 2.2), 1 when perfectly balanced.

    The probabilities are computed here, because what the router module returns differs between transformers releases.

    Parameters
    ----------
    hidden : Tensor
        ``[N, D]`` input of the router.
    weight : Tensor
        ``[E, D]`` weight of the router.
    top_k : int
        Experts used per token.
    """
    probabilities = F.linear(hidden, weight).softmax(-1)
    experts = probabilities.topk(top_k).indices
    load = F.one_hot(experts, len(weight)).sum((0, 1)) / experts.numel()
    return len(weight) * (load * probabilities.mean(0)).sum()
