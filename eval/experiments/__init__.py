"""The measurements behind the packed format of sealed pages, as scripts; their results are in `eval/results`."""
