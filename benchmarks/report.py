"""The benchmark's figures and tables."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import analysis
from benchmarks.analysis import Results
from benchmarks.landscapes import LANDSCAPES
from benchmarks.store import Key


def text_table(results: Results, own: str, seeds: Sequence[int] | None = None) -> str:
    """Mean final regret per strategy and landscape over the seeds that all have done, and `own`'s cost ratios."""
    strategies = list(results)
    if not strategies:
        return "no results"
    lines = [
        f"{'landscape':<12}{'seeds':>6}" + "".join(f"{name[:11]:>12}" for name in strategies) + "   best peer: ratio"
    ]
    everything: list[Key] = []
    for landscape in LANDSCAPES:
        keys = analysis.common_keys(results, strategies, [landscape])
        keys = [key for key in keys if seeds is None or key[1] in seeds]
        if keys:
            everything += keys
            lines.append(_row(landscape, results, own, strategies, keys))
    if everything:
        lines.append(_row("all", results, own, strategies, everything))
        ranks = analysis.ranks(results, strategies, everything)
        lines.append(f"{'mean rank':<18}" + "".join(f"{ranks[name]:>12.2f}" for name in strategies))
        regrets = [analysis.recommended_regret(results, name, everything) for name in strategies]
        lines.append(f"{'recommended':<18}" + "".join(f"{regret:>12.4f}" for regret in regrets))
        for label, field in (("suggestions", "suggestions"), ("s/suggestion", "cpu_seconds_per_suggestion")):
            means = [
                sum(getattr(results[name][key], field) for key in everything) / len(everything) for name in strategies
            ]
            lines.append(f"{label:<18}" + "".join(f"{mean:>12.2f}" for mean in means))
    return "\n".join(lines)


def _row(label: str, results: Results, own: str, strategies: Sequence[str], keys: Sequence[Key]) -> str:
    finals = {name: analysis.final_regret(results, name, keys) for name in strategies}
    row = f"{label:<12}{len(keys):>6}" + "".join(f"{finals[name].value:>12.4f}" for name in strategies)
    if own not in results or len(strategies) < 2:
        return row
    peer = analysis.best_peer(results, own, strategies, keys)
    ratio = analysis.cost_ratio(results, own, peer, keys)
    return f"{row}   {peer}: {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
