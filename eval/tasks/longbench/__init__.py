"""LongBench and LongBench-E: 21 and 13 sets of questions about long texts, in English, Chinese and code.

The official records come in, from the Hub, a folder or the bundled sample; samples in the official wording go out, cut
in the middle where they are too long. Imports nothing of the other tasks but `sample` and `frame`.
"""

from pikv_hf.eval.tasks.longbench.samples import bucket, bundled_sample, load, score
from pikv_hf.eval.tasks.longbench.sets import SETS, SETS_E, LongBenchSet
from pikv_hf.eval.tasks.longbench.truncate import truncate_middle

__all__ = ["SETS", "SETS_E", "LongBenchSet", "bucket", "bundled_sample", "load", "score", "truncate_middle"]
