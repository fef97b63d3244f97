"""RULER's 13 tasks, generated for any tokenizer and length.

A tokenizer, a length and a seed come in; samples in RULER's wording go out, as long as asked for and never longer.
Imports nothing of the other tasks but `sample` and `frame`.
"""

from pikv_hf.common.extras import extra

with extra("eval", needed_by=__name__):
    from pikv_hf.eval.tasks.ruler.generate import generate
    from pikv_hf.eval.tasks.ruler.haystack import Haystack
    from pikv_hf.eval.tasks.ruler.hub import load_hub
    from pikv_hf.eval.tasks.ruler.scoring import score
    from pikv_hf.eval.tasks.ruler.templates import TASKS

__all__ = ["TASKS", "Haystack", "generate", "load_hub", "score"]
