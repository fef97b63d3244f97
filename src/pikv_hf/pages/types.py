"""The type of page numbers, by which tables, pools and tiers name pages."""

import numpy as np
import numpy.typing as npt

#: Numbers of pages in a pool, `(n,)` int64.
PageIds = npt.NDArray[np.int64]
