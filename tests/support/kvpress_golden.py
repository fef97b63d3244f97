"""What each press of kvpress keeps with the release of transformers that kvpress was made for, as a file.

    PYTHONPATH=src:tests/support .venv/bin/python -P tests/support/kvpress_golden.py

writes it anew, with transformers 5.2. Models and prompts are those of `kvpress_cases.py`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from kvpress_cases import ARCHITECTURES, CASES, PressCase, context_and_question
from kvpress_runs import ask, model_for, the_tokenizer
from transformers import DynamicCache

FILE = Path(__file__).parents[1] / "golden" / "kvpress_kept.json"
LENGTH = 300
#: Logits of a step that are compared.
LOGITS = 4


def kept_by(architecture: str, case: PressCase) -> dict[str, Any]:
    """Ask one question through a press on a `DynamicCache`.

    Returns
    -------
    dict
        `lengths` of the layers; `kept`, the columns of each layer's KV heads as hexadecimal masks, the first column
        being the lowest bit, None for presses that change tokens; `logits`, some of each step, and the `largest`.
    """
    # Layers of different lengths, and marks, are only right in slow attention.
    how = "slow" if case.ragged_layers or case.head_wise else case.attention
    model = model_for(architecture, case, how)
    context, question = context_and_question(LENGTH)
    prompt = (context + case.in_context, [question])
    whole, cache = DynamicCache(), DynamicCache()
    ask(model, whole, None, *prompt)
    press = case.make(model, the_tokenizer())
    run = ask(model, cache, press, *prompt)
    return {
        "lengths": run.lengths,
        "kept": None if case.changes_tokens else _columns(model, whole, cache),
        "logits": [[round(value, 5) for value in step[:LOGITS].tolist()] for step in run.logits],
        "largest": round(float(run.logits.abs().max()), 5),
    }


def _columns(model: Any, whole: DynamicCache, cache: DynamicCache) -> list[list[str]]:
    """Return which columns of the whole cache are in another one, and not marked as evicted."""
    kept = []
    for before, layer, block in zip(whole.layers, cache.layers, model.model.layers, strict=True):
        same = (before.keys.unsqueeze(3) == layer.keys.unsqueeze(2)).all(dim=-1)
        if (marks := getattr(block.self_attn, "masked_key_indices", None)) is not None:
            # Those of the answer are out of the cache again.
            rows, heads, columns = torch.stack(list(marks))[:, marks[2] < same.shape[3]]
            same[rows, heads, :, columns] = False
        kept.append([hex(sum(1 << column for column in head.nonzero()[:, 0].tolist())) for head in same.any(-1)[0]])
    return kept


def main() -> None:
    """Write the file."""
    torch.set_num_threads(1)
    # RestoreKVPress changes the model, which each of its runs makes anew.
    found = {f"{case.id} {name}": kept_by(name, case) for case in CASES for name in ARCHITECTURES}
    lines = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in found.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
