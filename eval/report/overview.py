"""Arrange runs as methods by budgets: the same questions to one or several models, a row per method."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pikv_hf.eval.report.budgets import TOLERANCE
from pikv_hf.eval.report.common_options import Common, Traits, common_options, traits_of
from pikv_hf.eval.report.groups import Entry, Group, model_name
from pikv_hf.eval.report.pareto import pareto_front
from pikv_hf.eval.report.summary_file import Measure

#: So many methods besides the baseline have a colour; more could not be told apart.
COLOURED = 6
BASELINE = "base"

#: A column: which of the block's groups, and the share of the tokens that presses were asked to remove.
Place = tuple[int, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One method: its runs by place.

    Attributes
    ----------
    name : str
        The press, or the cache.
    notes : tuple of str
        What its runs have that most others have not.
    style : str
        Class of its colour: `base`, `c0` to `c5`, or empty.
    runs : Mapping
        Its run at each place.
    """

    name: str
    notes: tuple[str, ...]
    style: str
    runs: Mapping[Place, Entry]

    @property
    def label(self) -> str:
        """Name and notes on one line."""
        return ", ".join((self.name, *self.notes))


@dataclass(frozen=True, slots=True)
class Block:
    """The same questions asked of one or several models.

    Attributes
    ----------
    title, slug : str
        What was asked, and of which model if it is one; the first word of names of files.
    measure : Measure
        What the scores are.
    groups : tuple of Group
        One per model.
    models : tuple of str
        Their names.
    places : tuple of Place
        Columns: model by model, from the largest budget to the smallest.
    rows : tuple of Row
        The baseline, caches without a press, presses from the best to the worst; many caches come after the presses.
    common : str
        One sentence on what the runs have in common.
    """

    title: str
    slug: str
    measure: Measure
    groups: tuple[Group, ...]
    models: tuple[str, ...]
    places: tuple[Place, ...]
    rows: tuple[Row, ...]
    common: str

    @property
    def has_budgets(self) -> bool:
        """Whether any press was asked for a budget."""
        return any(ratio for _, ratio in self.places)

    def best(self, place: Place) -> float | None:
        """Return the best score, as it is shown, of the runs that keep to a budget; None if there are not two."""
        entries = [row.runs[place] for row in self.rows if place in row.runs]
        scores = [shown(entry.summary.score.mean, self.measure) for entry in entries if self.keeps_budget(place, entry)]
        if not place[1] or len(scores) < 2:
            return None
        return max(scores) if self.measure.higher_is_better else min(scores)

    def keeps_budget(self, place: Place, entry: Entry) -> bool:
        """Whether a run holds at most a tenth more than it was asked to, as a share of `DynamicCache`.

        That is in the model's dtype; runs of one model in several dtypes are compared in bf16.
        """
        cost = entry.summary.cost
        share = cost.kv_share_prefill_dtype if len(_dtypes(self.groups[place[0]])) == 1 else cost.kv_share_prefill
        return share is not None and share <= (1 + TOLERANCE) * (1 - place[1])


def blocks(groups: Sequence[Group]) -> list[Block]:
    """Put the groups that differ in the model alone into one block; blocks with more runs come first."""
    keyed: dict[tuple[str, str, str], list[Group]] = {}
    for group in groups:
        summary = group.entries[0].summary
        keyed.setdefault((summary.dataset, summary.data_dir, group.measure.name), []).append(group)
    found = [_block(tuple(members)) for members in keyed.values()]
    return sorted(found, key=lambda block: -sum(len(group.entries) for group in block.groups))


def shown(score: float, measure: Measure) -> float:
    """Return a score rounded as tables show it."""
    return round(score, 1 if measure.unit == "%" else 3)


def _block(groups: tuple[Group, ...]) -> Block:
    several = any(len(_dtypes(group)) > 1 for group in groups)
    methods = _methods(groups, several)
    common = common_options([traits for traits, _ in methods])
    ratios = [sorted({place[1] for runs in methods.values() for place in runs if place[0] == index})
              for index in range(len(groups))]  # fmt: skip
    places = tuple((index, ratio) for index, each in enumerate(ratios) for ratio in each)
    summaries = [group.entries[0].summary for group in groups]
    models = tuple(model_name(summary.model) for summary in summaries)
    asked = " ".join(part for part in (summaries[0].dataset, summaries[0].data_dir) if part)
    rows = _rows(methods, groups, common)
    return Block(
        title=groups[0].title if len(groups) == 1 else f"{asked}, {' and '.join(models)}",
        slug=groups[0].slug,
        measure=groups[0].measure,
        groups=groups,
        models=models,
        places=places,
        rows=rows,
        common=common.sentence([traits for traits, _ in methods], "" if several else _in_dtypes(groups, models)),
    )


#: Methods, and for runs that are alike in everything which of them.
_Methods = dict[tuple[Traits, int], dict[Place, Entry]]


def _dtypes(group: Group) -> list[str]:
    """Return the dtypes that a group's model ran in; one is empty where a file does not say."""
    return list(dict.fromkeys(traits_of(entry.summary).dtype for entry in group.entries))


def _in_dtypes(groups: Sequence[Group], models: Sequence[str]) -> str:
    """Say what each model ran in, where each ran in one dtype."""
    dtypes = [_dtypes(group)[0] for group in groups]
    if len(set(dtypes)) == 1:
        return dtypes[0] and f"model{'s' * (len(models) > 1)} in {dtypes[0]}"
    return "models: " + ", ".join(f"{model} in {dtype or 'a dtype unknown'}"
                                  for model, dtype in zip(models, dtypes, strict=True))  # fmt: skip


def _methods(groups: Sequence[Group], several_dtypes: bool) -> _Methods:
    """Arrange runs by traits and place; the dtype is one of the traits only if a model ran in several."""
    methods: _Methods = {}
    for index, group in enumerate(groups):
        for entry in group.entries:
            traits, place, copy = traits_of(entry.summary), (index, entry.summary.compression_ratio), 0
            traits = traits if several_dtypes else replace(traits, dtype="")
            while place in methods.setdefault((traits, copy), {}):
                copy += 1
            methods[traits, copy][place] = entry
    return methods


def _rows(methods: _Methods, groups: Sequence[Group], common: Common) -> tuple[Row, ...]:
    means = _means([runs for (traits, _), runs in methods.items() if traits.press])
    bare = sum(not traits.press for traits, _ in methods)
    # Two may stand above the presses, to compare with; more would push them off the first screen.
    last = bool(means) and bare > 2
    ordered = sorted(methods.items(), key=lambda item: _order(item[0], item[1], means, last))
    styles = _styles([runs for _, runs in ordered], groups)
    return tuple(
        Row(traits.name, (*common.notes(traits), *_where(copy, runs, methods[traits, 0])), style, runs)
        for ((traits, copy), runs), style in zip(ordered, styles, strict=True)
    )


def _means(pressed: Sequence[Mapping[Place, Entry]]) -> dict[Place, float]:
    """Return the mean score of the presses at each place that several have."""
    scores: dict[Place, list[float]] = {}
    for runs in pressed:
        for place, entry in runs.items():
            scores.setdefault(place, []).append(entry.summary.score.mean)
    return {place: statistics.fmean(each) for place, each in scores.items() if len(each) > 1}


def _order(
    method: tuple[Traits, int], runs: Mapping[Place, Entry], means: Mapping[Place, float], last: bool
) -> tuple[object, ...]:
    """Sort caches by their bytes, the largest first, and presses by how far they are above the others.

    The baseline comes first; other caches without a press come last where they are `last`.
    """
    traits, copy = method
    first = next(iter(runs.values())).summary
    if not traits.press:
        held = first.cost.kv_share_prefill
        rank = 2 if last and not first.is_baseline else 0
        return (rank, not first.is_baseline, -held if held is not None else 0.0, traits.name, copy)
    sign = -1 if first.measure.higher_is_better else 1
    above = [entry.summary.score.mean - means[place] for place, entry in runs.items() if place in means]
    return (1, not above, sign * statistics.fmean(above or [first.score.mean]), traits.name, copy)


def _styles(ordered: Sequence[Mapping[Place, Entry]], groups: Sequence[Group]) -> list[str]:
    """Colour the first methods of the Pareto fronts, and as many others from the top as there are colours left."""
    front = {id(entry) for group in groups for entry in pareto_front(group)}
    full = [any(entry.summary.is_baseline for entry in runs.values()) for runs in ordered]
    best = [any(id(entry) in front for entry in runs.values()) for runs in ordered]
    drawn = [any(entry.summary.cost.kv_share_prefill is not None for entry in runs.values()) for runs in ordered]
    bare = [any(entry.summary.press is None for entry in runs.values()) for runs in ordered]
    candidates = sorted((not best[i], bare[i], i) for i in range(len(ordered)) if drawn[i] and not full[i])
    chosen = sorted(index for *_, index in candidates[:COLOURED])
    colours = {index: f"c{place}" for place, index in enumerate(chosen)}
    return [BASELINE if full[index] else colours.get(index, "") for index in range(len(ordered))]


def _where(copy: int, runs: Mapping[Place, Entry], first: Mapping[Place, Entry]) -> tuple[str, ...]:
    """Name the folder of a run whose like there is already: the one above it, if that tells them apart."""
    if not copy:
        return ()
    own, other = (next(iter(each.values())).run.folder.resolve() for each in (runs, first))
    return (own.parent.name if own.parent != other.parent else own.name,)
