"""The variants (A) to (G) that the original was evaluated as, by its own protocol.

`protocol_study` measures them, `request_runs` is how one of them serves requests, `attention_hits` what its steps read.
"""
