"""
Where to cut rows, sorted by length, into micro-batches with few padded tokens. Pure torch and numpy.

A cut is given by its borders, `[0, ..., N]`; the rows between two of them are a part. The cost of a part is the number
of its rows times the sum of its two widths, which are those of its longest prompt and completion.

Up to `EXACT_ROWS` rows the cheapest cut is found exactly. With more rows

1. the limit on the largest part is found exactly, by greedy cuts;
2. `_coarse_cut` chooses borders among about a thousand places, which settles how many parts each range of lengths gets;
3. `_improve` moves all borders together among places near them: at first few in every part, at last any row.
"""

import math
from bisect import bisect_left
from itertools import pairwise

import numpy as np
import torch

# Up to this many rows the cut is exact. The time and memory of an exact cut grow with the square of the rows.
EXACT_ROWS = 512

# How thoroughly more rows are cut; benchmarks/planning.py measures the time and the excess over the exact cut.
_PLACES = 1_024  # where borders may be at first; twice the number of parts, if that is more
_PARTS = 2**20  # between these places that are considered
_PAIRS = 2**16  # of neighbouring borders' places that a later pass compares,
_LEAST_REACH = 8  # but at least so many places on either side of every border
_MOST_PASSES = 3  # over the same division into places
_LEAST_GAIN = 1e-4  # of the total, for another pass over the same division
_BORDERS_AT_ONCE = 128  # whose pairs are in memory together


def cheapest_cut(
    prompt_widths: torch.Tensor, completion_widths: torch.Tensor, num_cuts: int, largest: int
) -> list[tuple[int, int]]:  # (N,), (N,)
    """
    Cut sorted rows into contiguous parts with few padded tokens in all.

    Args:
        prompt_widths, completion_widths (`torch.Tensor` of shape `(N,)`):
            Width that each row needs; rows are sorted by the sum of their lengths.
        num_cuts (`int`):
            Number of parts, at most `N`. Each gets at least one row.
        largest (`int`):
            Padded tokens of the largest part; as few as any cut can have, where that is more.

    Returns:
        `list[tuple[int, int]]`: Start and end of every part.
    """
    if len(prompt_widths) <= EXACT_ROWS:
        return _exact_cut(_padded_tokens(prompt_widths, completion_widths), num_cuts, largest)
    parts = _Parts(prompt_widths, completion_widths)
    limit = _limit(parts, num_cuts, largest)
    return list(pairwise(_improve(parts, _coarse_cut(parts, num_cuts, limit), limit).tolist()))


def _padded_tokens(prompt_widths: torch.Tensor, completion_widths: torch.Tensor) -> torch.Tensor:  # 2 x (N,) -> (N, N)
    """Padded tokens of the part of the sorted rows i..j, at [i, j]; infinitely many for j < i."""
    size = len(prompt_widths)
    ahead = torch.ones(size, size, dtype=torch.bool).triu()

    def longest(widths: torch.Tensor) -> torch.Tensor:
        return torch.where(ahead, widths.expand(size, size), 0).cummax(dim=1).values if size else ahead.long()

    position = torch.arange(size)
    rows = position - position.unsqueeze(1) + 1
    return torch.where(ahead, (rows * (longest(prompt_widths) + longest(completion_widths))).double(), torch.inf)


def _exact_cut(cost: torch.Tensor, num_cuts: int, largest: float) -> list[tuple[int, int]]:
    """Boundaries (start, end) of the cut into exactly `num_cuts` parts with the smallest total cost."""
    size = len(cost)
    # bottleneck[j]: the smallest possible largest part of the first j rows in as many parts as rounds gone by
    bottleneck = cost[0].clone() if size else cost
    for _ in range(num_cuts - 1):
        bottleneck = torch.maximum(_before(bottleneck).unsqueeze(1), cost).amin(dim=0)
    if size:
        cost = torch.where(cost <= max(largest, float(bottleneck[-1])), cost, torch.inf)
    total, choices = cost[0].clone() if size else cost, []
    for _ in range(num_cuts - 1):
        total, choice = (_before(total).unsqueeze(1) + cost).min(dim=0)
        choices.append(choice)
    bounds, end = [], size
    for choice in reversed(choices):
        start = int(choice[end - 1])
        bounds.append((start, end))
        end = start
    return [(0, end), *reversed(bounds)] if size else []


def _before(best: torch.Tensor) -> torch.Tensor:  # (N,) -> (N,)
    """Best value of the rows before i, at [i]: infinite for i = 0, since every part holds a row."""
    return torch.cat([best.new_full((1,), torch.inf), best[:-1]])


class _Parts:
    """Padded tokens of any part of the sorted rows, from tables of O(N log N) entries instead of one of O(N^2)."""

    def __init__(self, prompt_widths: torch.Tensor, completion_widths: torch.Tensor) -> None:  # (N,), (N,)
        self.size = len(prompt_widths)
        self.all_tokens = self.size * int(prompt_widths.max() + completion_widths.max())  # as one part
        self.levels = self.size.bit_length()
        self.maxima = [self._range_maxima(widths) for widths in (prompt_widths, completion_widths)]
        own = (prompt_widths + completion_widths).cumsum(dim=0)
        self.unpadded = torch.cat([own.new_zeros(1), own])  # (N + 1,): tokens of the rows before i, at their own widths
        # Two ranges of 2**level rows cover a part, one from its first row, one to its last. By the part's number of
        # rows, these are their positions in a flattened table relative to the part's start and to its end.
        level = torch.tensor([max(rows.bit_length() - 1, 0) for rows in range(self.size + 1)])  # (N + 1,)
        self.first_range, self.last_range = level * self.size, level * self.size - 2**level

    def _range_maxima(self, widths: torch.Tensor) -> torch.Tensor:  # (N,) -> (levels, N)
        """Largest of the 2**level widths from row i on, at [level, i]; of those that there are, near the end."""
        maxima = widths.expand(self.levels, self.size).clone()
        for level in range(1, self.levels):
            half = 2 ** (level - 1)
            maxima[level] = maxima[level - 1]
            maxima[level, :-half] = torch.maximum(maxima[level - 1, :-half], maxima[level - 1, half:])
        return maxima

    def padded_tokens(self, starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Padded tokens of the parts from `starts` to before `ends`, which broadcast; not positive without a row."""
        rows = ends - starts
        known = rows.clamp(min=0)
        first, last = self.first_range.take(known).add_(starts), self.last_range.take(known).add_(ends)
        prompts, completions = (torch.maximum(table.take(first), table.take(last)) for table in self.maxima)
        return rows.mul_(prompts.add_(completions))

    def total(self, borders: torch.Tensor) -> int:
        """Padded tokens of all parts between these borders."""
        return int(self.padded_tokens(borders[:-1], borders[1:]).sum())

    def greedy_cut(self, limit: int, padding: int, max_parts: int) -> list[int]:
        """Borders of the cut with the fewest parts within both limits; empty if those are more than `max_parts`."""
        ends, borders = self._furthest_ends(limit, padding).tolist(), [0]
        while borders[-1] < self.size:
            end = ends[borders[-1]]
            if end == borders[-1] or len(borders) > max_parts:  # a row alone exceeds the limit, or one part too many
                return []
            borders.append(end)
        return borders

    def _furthest_ends(self, limit: int, padding: int) -> torch.Tensor:  # (N,)
        """End of the longest part from every row on with at most `limit` padded tokens, `padding` of them padding."""
        starts = torch.arange(self.size)
        ends, widths = starts, [torch.zeros_like(starts) for _ in self.maxima]
        for level in reversed(range(self.levels)):  # a longer part has more of both, so halving steps find the end
            at = ends.clamp(max=self.size - 1)
            wider = [torch.maximum(old, table[level].take(at)) for old, table in zip(widths, self.maxima, strict=True)]
            further = ends + 2**level
            tokens = (further - starts) * (wider[0] + wider[1])
            unpadded = self.unpadded.take(further.clamp(max=self.size)) - self.unpadded[:-1]
            fits = (further <= self.size) & (tokens <= limit) & (tokens - unpadded <= padding)
            ends = torch.where(fits, further, ends)
            widths = [torch.where(fits, new, old) for new, old in zip(wider, widths, strict=True)]
        return ends


def _limit(parts: _Parts, num_cuts: int, largest: int) -> int:
    """Padded tokens that the largest part may have: `largest`, or as few as any cut can have where that is more."""

    def feasible(limit: int) -> bool:
        return bool(parts.greedy_cut(limit, parts.all_tokens, num_cuts))

    if feasible(largest):
        return largest
    enough = -(-parts.size // num_cuts) * (parts.all_tokens // parts.size)  # for parts with equally many rows
    limits = range(max(largest, 0) + 1, enough)
    return limits.start + bisect_left(limits, True, key=feasible)


def _even_cut(parts: _Parts, num_cuts: int, limit: int) -> torch.Tensor:  # -> (K + 1,)
    """
    Borders of a cut into parts with about equal padding.

    Where lengths grow evenly from row to row this is the cheapest cut: moving a border adds as much padding to one part
    as it takes from the other.
    """
    # In steps of 2 %: a smaller one changes the number of parts by less than 1 %.
    paddings = [int(2 ** (step / 32)) - 1 for step in range(32 * parts.all_tokens.bit_length() + 1)]
    enough = bisect_left(paddings, True, key=lambda padding: bool(parts.greedy_cut(limit, padding, num_cuts)))
    return _with_more(torch.tensor(parts.greedy_cut(limit, paddings[enough], num_cuts)), num_cuts)


def _with_more(borders: torch.Tensor, num_cuts: int) -> torch.Tensor:  # -> (K + 1,)
    """These borders, and as many evenly spread ones as are missing for `num_cuts` parts. No part becomes larger."""
    free = torch.ones(int(borders[-1]), dtype=torch.bool)
    free[borders[:-1]] = False
    missing = num_cuts + 1 - len(borders)
    more = free.nonzero().flatten()[torch.arange(missing) * int(free.sum()) // max(missing, 1)]
    return torch.cat([borders, more]).sort().values


def _coarse_cut(parts: _Parts, num_cuts: int, limit: int) -> torch.Tensor:  # -> (K + 1,)
    """
    Borders of a cut that is cheap among those with borders at a few places only.

    The number of parts is not prescribed but has a price, so that one table of the cheapest costs is enough. The lowest
    price that leads to at most `num_cuts` parts is taken.
    """
    borders = _even_cut(parts, num_cuts, limit)
    finer = _even_cut(parts, min(parts.size, max(_PLACES, 2 * num_cuts)), limit)
    places = torch.cat([finer, borders]).unique()  # (M + 1,)
    longest = min(len(places) - 1, _PARTS // len(places))  # part, in places
    starts = torch.arange(len(places) - 1).unsqueeze(1) + torch.arange(1 - longest, 1)  # (M, longest)
    tokens = parts.padded_tokens(places[starts.clamp(min=0)], places[1:].unsqueeze(1))
    costs = torch.where((starts >= 0) & (tokens <= limit), tokens.double(), torch.inf).numpy()
    prices = [2 ** (step / 16) - 1 for step in range(16 * parts.all_tokens.bit_length() + 1)]
    enough = bisect_left(prices, True, key=lambda price: 0 < len(_priced_cut(costs, price)) <= num_cuts + 1)
    if enough == len(prices):  # the parts of such a cut have more places than `longest`
        return borders
    return _with_more(places[_priced_cut(costs, prices[enough])], num_cuts)


def _priced_cut(costs: np.ndarray, price: float) -> list[int]:  # (M, longest)
    """Border places of the cut with the lowest costs and `price` for every part; empty if all costs are infinite."""
    longest = costs.shape[1]
    best, chosen = np.full(longest + len(costs), np.inf), []
    best[longest - 1] = 0  # the first place; those before it stay infinite
    for end, cost in enumerate(costs):
        totals = best[end : end + longest] + cost
        chosen.append(int(totals.argmin()))
        best[end + longest] = totals[chosen[-1]] + price
    if np.isinf(best[-1]):
        return []
    places = [len(costs)]
    while places[-1] > 0:
        places.append(places[-1] - longest + chosen[places[-1] - 1])
    return places[::-1]


def _improve(parts: _Parts, borders: torch.Tensor, limit: int) -> torch.Tensor:  # (K + 1,) -> (K + 1,)
    """Move all borders together to cheaper places nearby: at first to few places in every part, at last to any row."""
    num_cuts = len(borders) - 1
    reach = max(_LEAST_REACH, math.isqrt(_PAIRS // num_cuts) // 2)
    total, pieces = parts.total(borders), 1
    while num_cuts > 1 and pieces < int(borders.diff().max()):
        pieces *= 2
        for _ in range(_MOST_PASSES):
            before = total
            total, borders = _cheapest_nearby(parts, borders, _places(borders, pieces, reach), limit)
            if before - total <= _LEAST_GAIN * total:
                break
    return borders


def _places(borders: torch.Tensor, pieces: int, reach: int) -> torch.Tensor:  # (K + 1,) -> (K - 1, 2 reach + 1)
    """Where each inner border may move: `reach` places on either side, with every part divided into `pieces`."""
    sizes = borders.diff()
    part = torch.arange(len(sizes)).repeat_interleave(sizes)  # (N,)
    piece = (torch.arange(len(part)) - borders[part]) * pieces // sizes[part]  # as many as rows, where those are fewer
    places = (part * pieces + piece).diff().nonzero().flatten() + 1
    nearby = torch.searchsorted(places, borders[1:-1]).unsqueeze(1) + torch.arange(-reach, reach + 1)
    return places[nearby.clamp(0, len(places) - 1)]


def _cheapest_nearby(
    parts: _Parts, borders: torch.Tensor, places: torch.Tensor, limit: int
) -> tuple[int, torch.Tensor]:  # (K + 1,), (K - 1, W) -> (K + 1,)
    """Total and borders of the cheapest cut with its inner borders at these places and no part larger than `limit`."""

    def cost(starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        tokens = parts.padded_tokens(starts, ends)
        return torch.where((tokens > 0) & (tokens <= limit), tokens.double(), torch.inf)

    total, choices = cost(borders[:1], places[0]), []
    for starts, ends in zip(places[:-1].split(_BORDERS_AT_ONCE), places[1:].split(_BORDERS_AT_ONCE), strict=True):
        for part in cost(starts.unsqueeze(2), ends.unsqueeze(1)):  # (W, W)
            total, choice = (total.unsqueeze(1) + part).min(dim=0)
            choices.append(choice)
    total, choice = (total + cost(places[-1], borders[-1:])).min(dim=0)
    at = [int(choice)]
    for choice_before in reversed(torch.stack(choices).tolist() if choices else []):
        at.append(choice_before[at[-1]])
    inner = places.gather(1, torch.tensor(at[::-1]).unsqueeze(1)).flatten()
    return int(total), torch.cat([borders[:1], inner, borders[-1:]])
