"""Which format packs keys and values with the least error of attention for its bytes, and what does each codec cost?

`eval/results/codec-schemes.json` (ways to quantise), `low-rank-bases.json` (bases per head or per expert shard) and
`codec-costs.json` (the codecs that were built) beside it; `codec_table` makes the table of docs/codecs.md of the last.
`pretrained_study` measures the codecs on a pretrained model, by perplexity and RULER, for `pretrained_table`; `--model`
of the first two studies, and `shared_bases`, judge schemes and bases by its keys and values.
"""
