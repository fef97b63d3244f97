"""The measurements behind the packed format and the table of the codecs, as scripts; results are in `eval/results`."""
