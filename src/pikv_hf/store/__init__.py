"""A store of contexts: what is known of earlier prompts is reused. `ContextStore` is the object that people use.

`radix_tree` finds the longest known prefix of tokens. `context_memory` keeps entries, `context_entry` says what one
costs, `eviction_value` which goes first. `context_folder` keeps files, `context_file` is one, `folder_report` lists
them. `context_key` says what else than tokens must be the same. `generation` reads what is not known, of several
prompts with `prompt_rows`, and nothing while there is an `active_press`.
"""
