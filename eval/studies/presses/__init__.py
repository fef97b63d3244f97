"""Which score tells the tokens that a press should keep, in how many bits, and how do presses compare on a real model?

`score_search` searched scores (`eval/results/press-search.json`); what came out is `PiKVPress`. `equal_bytes_study`
compares presses on a pretrained model, by one reading of each prompt for all of them. docs/presses.md has both.
"""
