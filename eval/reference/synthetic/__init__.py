"""Synthetic retrieval text: the reference model's training data, evaluation samples and the demo's haystack."""

from pikv_hf.eval.reference.synthetic.samples import Sample, make_sample, make_shared_samples
from pikv_hf.eval.reference.synthetic.tasks import TASKS
from pikv_hf.eval.reference.synthetic.text import HAYSTACKS, count_tokens

__all__ = ["HAYSTACKS", "TASKS", "Sample", "count_tokens", "make_sample", "make_shared_samples"]
