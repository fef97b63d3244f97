"""What a compiled CPU kernel is told, as 64-bit integers in memory: the fields of a call, and those of a pool.

Integers are addresses unless they count something; a `_HEAD` or `_PAGE` beside an address is the bytes to the next one.
"""

from typing import Final

#: Of a call. What threads count with comes first: tasks begun, threads begun, tasks done.
NEXT, THREADS, DONE = range(3)
#: What is new in each call: the query, the outputs and LSEs, the LSEs of pages (0: not wanted) and entries from one
#: query head to the next, memory for the parts of results, and for each thread.
QUERY, OUT, LSE, PAGE_LSE, PAGE_STRIDE, PARTIALS, SCRATCH = range(3, 10)
#: Scale and soft cap, two floats in one field; no cap is 0.
FLOATS = 10
#: What lists of pages say: rows, KV heads, query heads of each, parts that a list is read in, and tasks, which are all
#: parts of all lists.
ROWS, HEADS, GROUP, SPLITS, TASKS = range(11, 16)
#: Entries, `pool << 32 | page` or below 0, and where the lists of entries begin; lists from a row, and from a head, to
#: the next.
ENTRIES, STARTS, ROW_LISTS, HEAD_LISTS = range(16, 20)
#: Channels of queries and outputs, tokens of a page, records of the pools, and bytes of memory for a thread.
QUERY_DIM, VALUE_DIM, PAGE_SIZE, POOLS, SCRATCH_BYTES = range(20, 25)
#: Whole lines of cache, so that what comes behind them begins with one.
CALL_FIELDS: Final = 32

#: Of the keys, or the values, of a pool. KIND is one of the next; D channels are coded, LATENT_DIM stored behind them.
KIND, BITS, DIM, LATENT_KIND, LATENT_DIM = range(5)
FLOAT32, BFLOAT16, FLOAT16, INTEGERS, FP8 = range(5)
CODES, CODES_HEAD, CODES_PAGE = range(5, 8)
SPREAD, SPREAD_HEAD, SPREAD_PAGE = range(8, 11)
FLOOR, FLOOR_HEAD, FLOOR_PAGE, FLOOR_IS_INT8 = range(11, 15)
OUTLIERS, OUTLIERS_HEAD, OUTLIERS_PAGE = range(15, 18)
FINE, FINE_HEAD, FINE_PAGE = range(18, 21)
LATENT, LATENT_HEAD, LATENT_PAGE = range(21, 24)
#: Tokens of each page, int16; with the keys.
COUNTS = 24
#: Of the keys, and then as many of the values.
PART_FIELDS: Final = 32
POOL_FIELDS: Final = 2 * PART_FIELDS
