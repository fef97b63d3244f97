"""Find the runs that no other one beats in bytes and score at once."""

from pikv_hf.eval.report.groups import Entry, Group


def is_drawn(entry: Entry) -> bool:
    """Whether the bytes of a run were measured, so that it has a place in the figure."""
    return entry.summary.cost.kv_share_prefill is not None


def pareto_front(group: Group) -> list[Entry]:
    """Return the runs that no other one beats in bytes and score at once, by bytes."""
    drawn = [entry for entry in group.entries if is_drawn(entry)]
    front = [entry for entry in drawn if not any(_dominates(other, entry, group) for other in drawn)]
    return sorted(front, key=point)


def point(entry: Entry) -> tuple[float, float]:
    """Return where a run is drawn: its bytes in percent of `DynamicCache` in bf16, and its score."""
    share = entry.summary.cost.kv_share_prefill
    assert share is not None
    return 100 * share, entry.summary.score.mean


def _dominates(one: Entry, other: Entry, group: Group) -> bool:
    """Whether `one` is at least as good in both, and better in one."""
    sign = 1 if group.measure.higher_is_better else -1
    (x1, y1), (x2, y2) = point(one), point(other)
    return x1 <= x2 and sign * y1 >= sign * y2 and (x1, y1) != (x2, y2)
