"""The paged K/V of one attention layer: what transformers, attention, routers and presses speak to.

`layer` has the protocol, `layer_edits` settles and changes tokens, `layer_store` places them in the parts of a layer,
one per device or process. May import attention, scheduling, routing, page tables, tiers and all below them, and knows
the model only as the protocol `model_link.ModelLink`. K/V of a call come in through `PiKVLayer.update` and go into page
tables; dense K/V, or attention over the pages, come out.
"""
