"""Synthetic retrieval text: the reference model's training data, evaluation samples and the demo's haystack.

A task, a length and a random source come in, documents with needles, their questions and answers go out. Imports
nothing of the evaluation; every word is in the tokenizer, so that new words mean a new model.
"""

from pikv_hf.eval.reference.synthetic.samples import Sample, make_sample, make_shared_samples
from pikv_hf.eval.reference.synthetic.tasks import TASKS
from pikv_hf.eval.reference.synthetic.text import HAYSTACKS, count_tokens

__all__ = ["HAYSTACKS", "TASKS", "Sample", "count_tokens", "make_sample", "make_shared_samples"]
