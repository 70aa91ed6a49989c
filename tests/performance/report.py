"""What was measured → a table for the screen, and the verdict on every target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .agreement_part import PLAIN_PATH
from .before_part import SWITCHED_OFF
from .measuring import Record, paired, spread
from .profiling import REST
from .training_part import LIMIT, OURS, STOCK, TYPED

__all__ = [
    "Verdict",
    "limit_of",
    "table_of_agreement",
    "table_of_before",
    "table_of_cell",
    "table_of_growth",
    "table_of_trained",
    "verdicts",
    "verdicts_of_agreement",
    "verdicts_of_growth",
    "verdicts_of_trained",
]

OF_LIMIT = 1.15  # times the limit, training and inference
FASTER = {"train": {128: 3.0, 224: 2.0}, "infer": {128: 5.0, 224: 2.5}}  # than stock MONAI
# Largest difference of a probability from that of the plain path.
APART = {"float32": 1e-5, "mixed precision": 0.02}
OF_MEMORY = 1.1  # times the memory above the decoded input, from 128 to 512 slices


@dataclass(frozen=True)
class Verdict:
    """One target and what was measured."""

    text: str
    found: str
    passed: bool

    def __str__(self) -> str:
        return f"  {'pass' if self.passed else 'MISS'}  {self.text}: {self.found}"


def limit_of(records: Sequence[Record]) -> str:
    """The contender that is the limit."""
    return next(name for name in records[0] if name.startswith(LIMIT))


def verdicts(cell: dict[str, Any]) -> list[Verdict]:
    """The targets of a training or inference cell; sizes without a target of their own are held to the limit alone."""
    records, kind, size = cell["records"], cell["part"], cell["size"]
    ratio = paired(records, OURS, limit_of(records))
    found = [Verdict(f"at most {OF_LIMIT} × the limit", str(ratio), ratio.median <= OF_LIMIT)]
    least = FASTER[kind].get(size)
    for rival in () if least is None else ((STOCK,) if kind == "train" else (STOCK, TYPED)):
        ratio = paired(records, rival, OURS)
        # Where the limit itself is not that much faster, no program could be.
        told = f"{ratio} (the limit: {paired(records, rival, limit_of(records)).median:.2f})"
        found.append(Verdict(f"at least {least:g} × as fast as {rival}", told, ratio.median >= least))
    return found


def table_of_cell(cell: dict[str, Any]) -> str:
    """Milliseconds and ratios of every contender."""
    records = cell["records"]
    unit = "bag" if cell["part"] == "train" else "scan"
    place = "" if cell["scans"] is None else f", {cell['scans']}"
    title = f"{cell['part']}, {cell['size']} × {cell['size']}, {cell['norm']} norm{place}; {len(records)} repeats"
    rows = [[title, f"ms a {unit}", "× limit", "× this project", "waiting for data"]]
    for name in records[0]:
        waiting = [record[name]["loading"] for record in records if "loading" in record[name]]
        rows.append([
            f"{name} ({cell['limit']['form']})" if name == limit_of(records) else name,
            f"{1000 * spread([record[name]['seconds'] for record in records]).median:.1f}",
            str(paired(records, name, limit_of(records))),
            str(paired(records, name, OURS)),
            f"{spread(waiting).median:.1%}" if waiting else "",
        ])  # fmt: skip
    return _aligned(rows)


def table_of_agreement(found: Sequence[dict[str, Any]]) -> str:
    """Largest differences of probabilities from the plain path, and bags whose critical slice is another one."""
    paths = tuple(APART)
    rows = [["from the plain float32 path: largest difference of a probability", *paths]]
    changed = [["bags whose critical slice changes", "", ""]]
    for entry in found:
        name = f"{entry['size']} × {entry['size']}, {entry['norm']} norm"
        rows.append([name, *(f"{entry[path]:.1e}" for path in paths)])
        changed.append([name, *(f"{entry['critical slices'][path]} of {entry['bags']}" for path in paths)])
    return _aligned([*rows, *changed])


def table_of_before(cell: dict[str, Any]) -> str:
    """Milliseconds with and without the fast paths, and the shares of the stages of one profiled call."""
    records, kinds = cell["records"], (SWITCHED_OFF, OURS)
    place = "" if cell["scans"] is None else f", {cell['scans']}"
    rows = [
        [f"before and after: {cell['part']}, {cell['size']} × {cell['size']}, {cell['norm']} norm{place}", *kinds],
        [
            f"ms a {'bag' if cell['part'] == 'train' else 'scan'}, {len(records)} repeats",
            *(f"{1000 * spread([record[who]['seconds'] for record in records]).median:.1f}" for who in kinds),
        ],
        [f"× {OURS}", *(str(paired(records, who, OURS)) for who in kinds)],
    ]
    stages = dict.fromkeys([stage for who in kinds for stage in cell["shares"][who] if stage != REST] + [REST])
    rows += [[f"  {stage}", *(_share(cell["shares"][who], stage) for who in kinds)] for stage in stages]
    return _aligned(rows)


def _share(stages: dict[str, float], stage: str) -> str:
    return f"{stages[stage] / sum(stages.values()):.1%}" if stage in stages else ""


def table_of_trained(found: dict[str, Any]) -> str:
    """The AUC of every path with trained weights, and how far it is from the plain one."""
    title = f"trained weights, {found['cases']} cases ({found['positives']} positive) of {found['patients']} patients"
    rows = [[title, "AUC", "difference [95% interval]", "probability", "critical slice", "decision"]]
    for path, one in found["paths"].items():
        beside = [""] * 4
        if path != PLAIN_PATH:
            beside = [
                f"{one['difference']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]", f"{one['largest']:.1e}",
                f"{one['critical']} differ", f"{one['decisions']} differ",
            ]  # fmt: skip
        rows.append([path, f"{one['auc']:.4f}", *beside])
    return _aligned(rows)


def verdicts_of_trained(found: dict[str, Any]) -> list[Verdict]:
    """The same AUC within noise for every path, and the target on the float32 path."""
    verdicts = []
    for path, one in found["paths"].items():
        if path != PLAIN_PATH:
            interval = f"{one['difference']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]"
            text = f"AUC of the {PLAIN_PATH} path within the interval, {path}"
            verdicts.append(Verdict(text, interval, one["low"] <= 0 <= one["high"]))
    return [*verdicts, *verdicts_of_agreement([{path: found["paths"][path]["largest"] for path in APART}])]


def table_of_growth(growth: dict[str, Any]) -> str:
    """Times by size, in one run's own first size, and memory."""
    tables = []
    for entry in growth["timed"]:
        records = entry["records"]
        names = list(records[0])
        others = [what for what in records[0][names[0]] if what not in ("seconds", "loading")]
        rows = [[entry["what"], "ms", f"× {names[0]}", *(f"{what}, ms" for what in others)]]
        for name in names:
            values = [spread([record[name][what] for record in records]).median for what in ("seconds", *others)]
            ratio = str(paired(records, name, names[0]))
            rows.append([name, f"{1000 * values[0]:.1f}", ratio, *(f"{1000 * value:.1f}" for value in values[1:])])
        tables.append(_aligned(rows))
    rows = [["memory", "pixels", "slices", "MiB above start and input", "MiB of the process"]]
    for row in growth["memory"]:
        name = f"{row['what']}, {row['who']}"
        rows.append(
            [name, str(row["side"]), str(row["slices"]), f"{row['bytes'] / 2**20:.0f}", f"{row['peak'] / 2**20:.0f}"]
        )
    cohort = [["memory of training a cohort", "MiB above start", "MiB of the process", "of the largest worker"]]
    for row in growth["memory of a cohort"]:
        worker = f"{row['worker'] / 2**20:.0f}" if row["workers"] else ""
        values = [f"{row[what] / 2**20:.0f}" for what in ("bytes", "peak")]
        cohort.append([f"{row['cases']} cases, {row['workers']} workers", *values, worker])
    return "\n\n".join([*tables, _aligned(rows), _aligned(cohort)])


def verdicts_of_growth(growth: dict[str, Any], slices: Sequence[int], sides: Sequence[int]) -> list[Verdict]:
    """The target on memory.

    Args:
        growth: see `growth_part.growth`.
        slices: of the series that were to be measured; the last two are compared.
        sides: pixels of a slice, each of which is held to the target.
    """
    return [_of_memory(growth, slices[-2], slices[-1], side) for side in sides if len(slices) > 1]


def _of_memory(growth: dict[str, Any], first: int, last: int, side: int) -> Verdict:
    rows = [row for row in growth["memory"] if row["what"] == "classifying a series" and row["who"] == OURS]
    above = {row["slices"]: row["bytes"] for row in rows if row["side"] == side}
    text = f"at most {OF_MEMORY} × the memory from {first} to {last} slices of {side} pixels"
    for size in (first, last):
        if size not in above:
            return Verdict(text, f"no measurement at {size} slices, the process was killed", False)
        # As much as nothing above the scan cannot be told from a measurement that went wrong, and has no ratio.
        if above[size] <= 0:
            return Verdict(text, f"{above[size] / 2**20:.1f} MiB at {size} slices, which gives no ratio", False)
    ratio = above[last] / above[first]
    return Verdict(text, f"{ratio:.2f}", ratio <= OF_MEMORY)


def verdicts_of_agreement(found: Sequence[dict[str, Any]]) -> list[Verdict]:
    """The targets on both types."""
    worst = {path: max(entry[path] for entry in found) for path in APART}
    text = "probabilities at most {:g} from the plain path in {}"
    return [Verdict(text.format(APART[path], path), f"{one:.1e}", one <= APART[path]) for path, one in worst.items()]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
             for row in rows]  # fmt: skip
    return "\n".join([lines[0], "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])])
