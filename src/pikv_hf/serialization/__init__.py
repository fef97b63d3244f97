"""Saving a cache to a file, or to one for each process, and loading it again; the format and its versions live here.

It may import the layer, what a layer consists of, and the attachment of a model, but not the cache, which imports it.
A cache goes in and a checked file comes out, and a file, a model and a function that makes an empty cache give a cache.
"""
