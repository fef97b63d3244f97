"""A store of contexts: what is known of earlier prompts is reused. `ContextStore` is the object that people use.

`radix_tree` finds the longest known prefix of tokens, `context_entry` says what a stored context costs,
`eviction_value` which goes first, `context_key` what else than tokens must be the same, and `generation` reads what is
not known.
"""
