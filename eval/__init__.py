"""The reference model, the synthetic retrieval tasks it is trained on, and the demo and benchmark commands."""
