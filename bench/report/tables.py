"""The generated tables, as Markdown.  Every table of bounds says so in its title; the others are of measurements."""

from collections.abc import Iterable, Iterator

from bench.report import plots
from bench.report.figures import (
    UNKNOWN,
    Measurement,
    beside,
    bounds,
    headline,
    measurements,
    model,
    of_kind,
    of_task,
    setting,
    source,
    step,
    threads,
)
from bench.rows import FINETUNE, PRETRAIN, Row, newest
from bench.step.pricing import CLASSES

NO_BOUND = "No priced step is on record."
NO_GPU = "No GPU row exists in `bench/results` yet: nothing here was measured on a GPU."
RECORD = "record: device · CUDA driver · torch · Triton · commit · date"


def markdown(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    heads = list(heads)
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"


def bounds_table(rows: list[Row], task: str = PRETRAIN) -> Iterator[str]:
    found = bounds(rows, task)
    if not found:
        yield NO_BOUND
        return
    yield "**Bounds, not measurements**: no implementation of these calls takes less; how much more a run takes is unknown."
    yield ""
    heads = ["model", "step", "for", "kernels + products + memsets", "waits", "GB", "GB outside products and attention"]
    heads += ["product TFLOP", "peak GiB", "bound ms", "of which dense solves ms", "configuration", RECORD]
    yield from markdown(heads, (_bound(row, found) for row in found))


def _bound(row: Row, among: list[Row]) -> list[str]:
    t = row.record["totals"]
    solves = t["bound_ms"] - t["bound_without_solves_ms"]
    counts = f"{t['kernels']} + {t['gemms']} + {t['memsets']}"
    numbers = [f"{t[name]:.1f}" for name in ("gb", "gb_outside_gemm_attention", "gemm_tflop", "peak_gib", "bound_ms")]
    name = [model(row.record["config"]), step(row), row.record["peaks"].upper()]
    return [*name, counts, str(t["syncs"]), *numbers, f"{solves:.1f}", setting(row, among), source(row)]


def shares_table(rows: list[Row], task: str = PRETRAIN) -> Iterator[str]:
    chosen = headline(rows, task)
    if chosen is None:
        yield NO_BOUND
        return
    found = beside(rows, chosen)
    gpu = chosen.record["peaks"].upper()
    yield f"![Bound of the step by class of call on an {gpu}, not measured](plots/{plots.SHARES[task]}.svg)"
    yield ""
    yield f"**Bounds by class of call on an {gpu}, not measurements** [ms, share of the step]:"
    yield ""
    heads = ["model", "step", *CLASSES, "configuration"]
    yield from markdown(
        heads, ([model(row.record["config"]), step(row), *_shares(row), setting(row, found)] for row in found)
    )


def _shares(row: Row) -> Iterator[str]:
    whole = row.record["totals"]["bound_ms"]
    for kind in CLASSES:
        ms = row.record["classes"][kind]["bound_ms"]
        yield f"{ms:.1f} ({ms / whole:.0%})"


def roofline_plot(rows: list[Row]) -> Iterator[str]:
    numbers = plots.roofline_numbers(rows)
    if numbers is None:
        yield NO_BOUND
        return
    yield f"![{numbers['title']}: bound, not measured](plots/roofline.svg)"
    yield ""
    rest = ", ".join(f"{name} {ms:.1f} ms" for name, ms in numbers["bytes only"].items())
    yield (
        "Groups of calls at their bound: FLOPs over bytes, and FLOPs over the least time; a group of unlike calls lies "
        f"under the roof. Our operations are parts of the groups. Without matrix products, so not drawn: {rest}."
    )


def steps_table(rows: list[Row], task: str = PRETRAIN) -> Iterator[str]:
    found = [m for m in measurements(of_task(rows, task), "step", "ms") if m.on_gpu]
    if not found:
        yield NO_GPU
        return
    heads = ["model", "step", "ms", "images/s", "MFU", "bound ms", "bound / measured", "configuration", RECORD]
    yield from markdown(heads, (_measured_step(m, [n.row for n in found]) for m in found))


def _measured_step(m: Measurement, among: list[Row]) -> list[str]:
    r, measured = m.row.record, m.row.record["measured"]
    numbers = [f"{m.reading.value:.2f}", f"{measured['images_per_s']:.0f}", f"{measured['mfu']:.1%}"]
    numbers += [f"{r['totals']['bound_ms']:.1f}", f"{measured['share_of_bound']:.1%}"]
    return [model(r["config"]), step(m.row), *numbers, setting(m.row, among), source(m.row)]


def training_table(rows: list[Row]) -> Iterator[str]:
    found = measurements(rows, "train", "images/s")
    if not found:
        yield "No row of `python -m bench train` is on record."
        return
    heads = ["model", "images/s (20th to 80th percentile)", "MFU", "wait for data", "peak GiB", "configuration", RECORD]
    among = [m.row for m in found]
    yield from markdown(heads, (_training(m, among) for m in found))


def _training(m: Measurement, among: list[Row]) -> list[str]:
    r = m.row.record
    rate = f"{m.reading.value:.1f} ({m.reading.low:.1f} to {m.reading.high:.1f})"
    mfu = UNKNOWN if r["mfu"] is None else f"{r['mfu']:.1%}"
    return [
        model(r["config"]) + (", fine-tuning" if r["task"] == FINETUNE else ""),
        rate,
        mfu,
        f"{r['data wait']:.1%}",
        f"{r['peak GiB']:.2f}",
        setting(m.row, among),
        source(m.row),
    ]


def pairs_table(rows: list[Row]) -> Iterator[str]:
    found = measurements(rows, "pairs", "ratio")
    if not found:
        yield "No row of `python -m bench pairs` is on record."
        return
    heads = ["model", "measured on", "mimir_fast images/s", "textbook images/s", "ratio (20th to 80th percentile)"]
    yield from markdown([*heads, "pairs", "configuration", RECORD], (_pair(m, [n.row for n in found]) for m in found))


def _pair(m: Measurement, among: list[Row]) -> list[str]:
    r = m.row.record
    where = m.row.device if m.on_gpu else f"a CPU, {threads(r)}"
    rates = [f"{r['images/s'][name]:.1f}" for name in ("mimir_fast", "textbook")]
    ratio = f"{m.reading.value:.2f} ({m.reading.low:.2f} to {m.reading.high:.2f})"
    how = setting(m.row, among).replace("compiled", "ours compiled, the textbook eager")
    return [model(r["config"]), where, *rates, ratio, str(len(r["ratios"])), how, source(m.row)]


def kernels_table(rows: list[Row]) -> Iterator[str]:
    cases = plots.rival_cases(rows)
    if not cases:
        yield f"{NO_GPU} The table and the plot appear with the first rows of `python -m bench kernels`."
        return
    if plots.rivals_numbers(rows) is not None:
        yield "![Milliseconds of our kernels and their rivals, measured](plots/rivals.svg)"
        yield ""
    yield f"Medians (20th to 80th percentile) at the shapes of `{plots.RECIPE}`; `bench/results` has the other recipes'."
    yield ""
    impls = list(dict.fromkeys(impl for found in cases.values() for impl in found))
    heads = ["operation", "shapes of", "shape", "dtype", "direction", *(f"{impl} ms" for impl in impls), RECORD]
    yield from markdown(heads, (_case(case, found, impls) for case, found in cases.items()))


def _case(case: plots.Case, found: dict[str, Measurement], impls: list[str]) -> list[str]:
    records = dict.fromkeys(source(m.row) for m in found.values())
    return [*case[:-1], *(_milliseconds(found.get(impl)) for impl in impls), "<br>".join(records)]


def _milliseconds(m: Measurement | None) -> str:
    if m is None:
        return UNKNOWN
    spread = "" if m.reading.low is None else f" ({m.reading.low:.4g} to {m.reading.high:.4g})"
    return f"{m.reading.value:.4g}{spread}"


def losses_table(rows: list[Row]) -> Iterator[str]:
    found = [group[-1] for group in newest(of_kind(rows, "losses")).values()]
    if not found:
        yield "No row of `python -m bench losses` is on record."
    for row in found:
        r = Measurement(row, next(iter(row.readings.values()))).row.record
        command = f"python -m bench losses --data_root FOLDER -- {' '.join(r['flags'])}"
        yield f"`{command}`; {source(row)}. Means over {r['window']} updates:"
        yield ""
        heads = ["updates", *(_run(name, len(runs)) for name, runs in r["points"].items())]
        yield from markdown(heads, _windows(r))
        yield ""
        spread = r["seed to seed"]
        moved = [
            f"{name} by at most {r[name]['largest']:.3f} ({r[name]['mean']:.3f})" for name in r["points"] if name in r
        ]
        yield (
            f"Between seeds the curves differ by at most {spread['largest']:.3f}, by {spread['mean']:.3f} on average; "
            f"16 bits move them: {', '.join(moved)}."
        )


def _run(name: str, seeds: int) -> str:
    return f"{name}, seed 0" if seeds == 1 else f"{name}, seeds 0 to {seeds - 1}"


def _windows(record: dict) -> Iterator[list[str]]:
    runs = record["points"].values()
    for number in range(len(record["points"]["fp32"][0])):
        first, last = number * record["window"] + 1, (number + 1) * record["window"]
        yield [f"{first}–{last}", *(" / ".join(f"{seed[number]:.3f}" for seed in run) for run in runs)]
