"""Hooks into models of transformers: attention function, masks, expert routers, what kvpress marks, reading ahead.

`attachment` puts them in place and takes them away; `model_modules` finds where they belong. May import the layer and
all below it, and is imported by the cache, presses and the evaluation alone. Calls of the model come in; K/V, queries
and chosen experts go to the layers of a cache, attention outputs back.
"""
