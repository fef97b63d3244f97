"""The attributes that this project sets on objects of other libraries: one place that names them all.

They carry what has no other way through code that is not ours: from a cache layer to the attention function, from the
mask function to the layers, from a press to the attention that it watches, and from a model to its attachment.
"""

#: On the tensors of keys and values that a layer returns: the :class:`~pikv_hf.layer.layer.PiKVLayer` to attend over.
LAYER_ATTRIBUTE = "_pikv_layer"

#: On a mask: the :class:`~pikv_hf.layer.mask_columns.MaskColumns` that all layers share.
COLUMNS_ATTRIBUTE = "_pikv_columns"

#: On an attention module: what a press wants called with the queries of each call, as
#: `(query, tokens before it, which of its tokens are real, scale, sinks, softcap, keys of the same tokens, how queries
#: are moved)`.
OBSERVER_ATTRIBUTE = "_pikv_observer"

#: On an attention module: what its layer's expert router chose, and what that of the layer below chose, while a press
#: watches the routers.
ROUTING_ATTRIBUTE = "_pikv_routing"
ROUTING_BELOW_ATTRIBUTE = "_pikv_routing_below"

#: On a model: its :class:`~pikv_hf.integration.attachment.Attachment`.
ATTACHMENT_ATTRIBUTE = "_pikv_attachment"
