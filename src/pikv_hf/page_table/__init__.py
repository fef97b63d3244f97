"""Page tables: the rows of a layer's cache, the sequences that they share copy-on-write, and the pages of these.

They may import tiers, pools, codecs and what is below; they know no layer, no attention and no scheduler. In come
tokens, and changes of rows and lengths; out go slots to write to, and what attention and routing read: plans, page
numbers and dense K/V.
"""
