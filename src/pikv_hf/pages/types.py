"""Names of types that pools and those who use them share."""

import numpy as np
import numpy.typing as npt

#: Numbers of pages in a pool, `(n,)` int64.
PageIds = npt.NDArray[np.int64]
