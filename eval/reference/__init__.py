"""The bundled model: loading it and its tokenizer without a network, and the synthetic text that it was trained on.

Nothing comes in but a seed and a length; a model, a tokenizer and samples go out. Imports nothing else of the
evaluation; its training is in `pikv_hf.eval.training`, which no wheel has.
"""
