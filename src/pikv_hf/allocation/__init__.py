"""What a byte budget keeps of a context: the loss of evicting or narrowing each token, and the widths that lose least.

Pure functions on tensors, for presses, which decide once, and for the layers of a cache with a budget, which go on
deciding while the model generates. It may import kernels and what is common; it knows no layer and no cache.
"""
