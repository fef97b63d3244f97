"""One-off studies that decided how the cache is built: each is run from a checkout, no wheel has them.

A study's folder says what was asked, and where its result file is; `python -m pikv_hf.eval.studies.FOLDER.STUDY`
repeats it. May import all of the evaluation, which may not import them.
"""
