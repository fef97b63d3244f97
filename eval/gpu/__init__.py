"""One command that checks every kernel on a GPU and measures what it reads: ``python -m pikv_hf.eval.gpu``.

It needs torch, Triton and `pikv_hf.kernels` alone, so that it runs where nothing else is installed.
"""
