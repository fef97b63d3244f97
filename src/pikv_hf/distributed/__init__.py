"""Where the parts of a cache are: devices of one process, or several processes that merge what they attend to.

`device_layout` divides shards among devices, `process_exchange` has the collectives, `lockstep` tells whether processes
compute the same. May import kernels and what is common, and knows neither layers nor pages. Names of devices or a
process group come in; a layout of parts goes out, and merged attention outputs.
"""
