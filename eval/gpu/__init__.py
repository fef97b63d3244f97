"""One command that checks every kernel on a GPU and measures what it reads: ``python -m pikv_hf.eval.gpu``.

It needs torch, Triton and `pikv_hf.kernels` alone (and `provenance`, which needs torch), so that it runs where nothing
else is installed. Nothing comes in but the device; a JSON file goes out: the error of each kernel against float64, and
the bandwidth that it reaches.
"""
