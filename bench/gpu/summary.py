"""The page that `bench gpu` leaves: what ran, what it found."""

from collections.abc import Iterator

from bench.gpu.stages import Outcome
from bench.report.figures import attack
from bench.rows import FINETUNE
from bench.train import lines as train_lines

SHOWN = 12  # lines of a failed stage's log
NO_TIME = "-"


def page(outcomes: list[Outcome], planned: int, machine: dict) -> str:
    """Markdown of the outcomes so far, out of `planned` stages; machine: a heading (bench.records)."""
    parts = [_head(outcomes, planned, machine), _stages(outcomes)]
    records = {o.stage.name: o.records for o in outcomes if o.records}
    steps = [r for name, found in records.items() if name.startswith(("step ", "finetune ")) for r in found]
    if "peaks" in records:
        parts.append(["## The GPU", "", *_peaks(records["peaks"][-1])])
    if steps:
        parts.append(["## One step", "", *_steps(steps)])
    if "train" in records:
        parts.append(["## The training loop", "", *_code(train_lines(records["train"][-1]))])
    for name in ("kernels", "profile"):
        for o in outcomes:
            if o.stage.name == name and o.status == "ok":
                parts.append([f"## {name.capitalize()}", "", *_code(_told(o.tail))])
    parts += [_trouble(o) for o in outcomes if o.status in ("failed", "over time")]
    return "\n".join("\n".join(part) + "\n" for part in parts)


def _head(outcomes: list[Outcome], planned: int, machine: dict) -> list[str]:
    device = next((r["device"] for o in outcomes for r in o.records if "device" in r), machine["device"])
    bad = [o.stage.name for o in outcomes if o.status in ("failed", "over time")]
    verdict = f"{len(outcomes)} of {planned} stages done" + (f"; NOT ok: {', '.join(bad)}" if bad else "")
    versions = f"torch {machine['torch']}, triton {machine['triton']}"
    found = [f"# {device}, commit {machine['commit']}", "", f"{machine['date']}; {versions}; {verdict}."]
    if device.startswith("pretend"):
        found.append("A pretend GPU: launches and memory are exact, nothing here is a measured time.")
    return found


def _stages(outcomes: list[Outcome]) -> list[str]:
    rows = ["| stage | outcome | seconds | allowed | log |", "| --- | --- | --- | --- | --- |"]
    for o in outcomes:
        why = f" ({o.stage.why})" if o.stage.why else ""
        log = o.log.name if o.log else NO_TIME
        rows.append(f"| {o.stage.name} | {o.status}{why} | {o.seconds:.0f} | {o.limit:.0f} | {log} |")
    return rows


def _peaks(record: dict) -> Iterator[str]:
    yield f"{record['memory GiB']:.0f} GiB, {record['multiprocessors']} multiprocessors."
    yield ""
    yield "| | reached | data sheet |"
    yield "| --- | --- | --- |"
    for name, reached in record["reached"].items():
        sheet = record["data sheet"] and record["data sheet"][name]
        yield f"| {name} | {_number(reached)} | {_number(sheet)} |"


def _steps(records: list[dict]) -> Iterator[str]:
    yield "| model | variant | ms | images/s | MFU | bound ms | bound / measured | launches | peak GiB |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for r in records:
        measured, totals = r["measured"] or {}, r["totals"]
        cells = [
            r["config"]["model"],
            r["variant"] if r.get("task") != FINETUNE else f"{r['variant']}, {attack(r)}",
            _number(measured.get("ms"), 1),
            _number(measured.get("images_per_s")),
            _number(measured.get("mfu"), 3),
            _number(totals["bound_ms"], 1),
            _number(measured.get("share_of_bound"), 3),
            str(totals["launches"]),
            _number(totals["peak_gib"], 1),
        ]
        yield f"| {' | '.join(cells)} |"


def _trouble(outcome: Outcome) -> list[str]:
    """The end of the log of a stage that did not work."""
    return [f"## {outcome.stage.name}: {outcome.status}", "", *_code(outcome.tail[-SHOWN:])]


def _code(text) -> list[str]:
    return ["```", *text, "```"]


def _told(tail: list[str]) -> list[str]:
    """A log's last lines without progress bars and the profiler's own."""
    return [line for line in tail if "%|" not in line and not line.startswith("USDT:")]


def _number(value: float | None, digits: int = 0) -> str:
    return NO_TIME if value is None else f"{value:.{digits}f}"
