"""SCBench (arXiv 2412.10319): several questions about one context, each read with it or one after the other."""
