"""Small things that every floor needs: budgets in bytes, keys or values, tensors between devices, extras, hints.

Nothing here imports another folder of this package but the kernels. In and out go plain values and tensors.
"""
