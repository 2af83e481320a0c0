"""The priced step as a table for people and as a record for bench/results."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from bench.peaks import Peak
from bench.step.counts import Counts
from bench.step.pricing import CLASSES, Price

TOP = 15
OURS = "mimir_fast."
GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Roofline:
    """A step's prices on one GPU, with what was counted and, on a real GPU, measured.

    outside   kernel name -> launches that belong to no recorded call and have no price
    nodes     file of an Inductor kernel -> the operations it was made from
    ms        median measured milliseconds, None on a pretend GPU
    """

    prices: list[Price]
    peak: Peak
    counts: Counts
    peak_gib: float
    batch: int
    outside: dict[str, int] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    ms: float | None = None

    def sum(self, prices: list[Price]) -> dict[str, float]:
        """count, GB, TFLOP and bound in ms of some prices."""
        return {
            "count": len(prices),
            "gb": sum(p.bytes for p in prices) / GIGA,
            "tflop": sum(sum(p.flops.values()) for p in prices) / TERA,
            "bound_ms": sum(p.seconds(self.peak) for p in prices) * 1e3,
        }

    def classes(self) -> dict[str, dict[str, float]]:
        return {kind: self.sum([p for p in self.prices if p.kind == kind]) for kind in CLASSES}

    def totals(self) -> dict[str, float]:
        """Counts of the step, GB of all and outside GEMM and attention, GEMM TFLOP, peak GiB, bound with and without solves."""
        parts, whole = self.classes(), self.sum(self.prices)
        return {
            **self.counts.as_dict(),
            "gb": whole["gb"],
            "gb_outside_gemm_attention": whole["gb"] - parts["GEMM"]["gb"] - parts["attention"]["gb"],
            "gemm_tflop": parts["GEMM"]["tflop"],
            "peak_gib": self.peak_gib,
            "bound_ms": whole["bound_ms"],
            "bound_without_solves_ms": whole["bound_ms"] - parts["solves"]["bound_ms"],
        }

    def measured(self) -> dict[str, float] | None:
        """ms, images/s, MFU (GEMM and attention FLOPs over what the bf16 peak could do in that time), bound / ms."""
        if self.ms is None:
            return None
        parts = self.classes()
        flops = (parts["GEMM"]["tflop"] + parts["attention"]["tflop"]) * TERA
        return {
            "ms": self.ms,
            "images_per_s": self.batch / self.ms * 1e3,
            "mfu": flops / (self.ms / 1e3 * self.peak.flops["bf16"]),
            "share_of_bound": self.totals()["bound_ms"] / self.ms,
        }

    def grouped(self, kinds: tuple[str, ...], key: str) -> list[dict]:
        """Prices of some classes added up by `name` or `file`, most expensive first."""
        groups: dict[str, list[Price]] = {}
        for p in self.prices:
            if p.kind in kinds:
                groups.setdefault(getattr(p, key), []).append(p)
        rows = [{"name": g[0].name, **self.sum(g), "nodes": self.nodes.get(g[0].file, "")} for g in groups.values()]
        return sorted(rows, key=lambda row: -row["bound_ms"])

    def ours(self) -> dict[str, dict[str, float]]:
        """Our operations by name, in the order in which they first ran."""
        groups: dict[str, list[Price]] = {}
        for p in self.prices:
            if p.name.startswith(OURS) and p.kind != "solves":
                groups.setdefault(p.name.removeprefix(OURS).removesuffix(".default"), []).append(p)
        return {name: self.sum(group) for name, group in groups.items()}

    def unpriced(self) -> list[dict]:
        """Calls that lack a part of their price, and launches that belong to no call."""
        lacking: dict[tuple[str, str], list[Price]] = {}
        for p in self.prices:
            if p.why:
                lacking.setdefault((p.name, p.why), []).append(p)
        rows = [{"name": n, "why": why, "count": len(g), "gb": self.sum(g)["gb"]} for (n, why), g in lacking.items()]
        outside = "launched outside of every recorded call, bytes unknown"
        return rows + [{"name": n, "why": outside, "count": c, "gb": 0.0} for n, c in self.outside.items()]

    def record(self) -> dict:
        """Everything the table shows, for one line of JSON."""
        remainder = self.grouped(("other ATen",), "name")
        return {
            "classes": self.classes(),
            "totals": self.totals(),
            "measured": self.measured(),
            "unpriced": self.unpriced(),
            "remainder": [{k: row[k] for k in ("name", "count", "gb")} for row in remainder],
            "ours": self.ours(),
            "top": self.grouped(("Inductor",), "file")[:TOP],
        }


def lines(record: dict) -> Iterator[str]:
    """The record as text."""
    head = "{:<12}{:>7}{:>10}{:>9}{:>10}".format
    yield head("class", "calls", "GB", "TFLOP", "bound ms")
    row = "{:<12}{count:>7}{gb:>10.2f}{tflop:>9.3f}{bound_ms:>10.2f}".format
    for kind, part in record["classes"].items():
        yield row(kind, **part)
    yield ""
    total = "kernels + GEMMs + memsets {kernels} + {gemms} + {memsets} = {launches}; syncs {syncs}; copies to host {to_host}"
    yield total.format(**record["totals"])
    total = "{gb:.1f} GB in all, {gb_outside_gemm_attention:.1f} GB outside GEMM and attention; GEMM {gemm_tflop:.2f} TFLOP; "
    total += "peak {peak_gib:.2f} GiB; bound {bound_ms:.1f} ms ({bound_without_solves_ms:.1f} ms without dense solves)"
    yield total.format(**record["totals"])
    if record["measured"]:
        measured = "measured {ms:.2f} ms, {images_per_s:.0f} images/s, MFU {mfu:.1%}, {share_of_bound:.1%} of the bound's speed"
        yield measured.format(**record["measured"])
    if record["top"]:
        yield f"\nthe {len(record['top'])} most expensive Inductor kernels (calls, GB, bound ms, made from)"
    for top in record["top"]:
        yield "{count:>5}{gb:>8.2f}{bound_ms:>8.2f}  {name}".format(**top)
        yield f"{'':23}{shortened(top['nodes'])}"
    yield "\nour operations, priced by their contracts (calls, GB, bound ms)"
    for name, row in record["ours"].items():
        yield "{count:>5}{gb:>8.2f}{bound_ms:>8.2f}  {name}".format(name=name, **row)
    yield "\nother ATen, priced by input plus output bytes (calls, GB)"
    for rest in record["remainder"]:
        yield "{count:>5}{gb:>9.3f}  {name}".format(**rest)
    yield "\nunpriced in part or in whole: " + ("nothing" if not record["unpriced"] else "")
    for rest in record["unpriced"]:
        yield "{count:>5}{gb:>9.3f}  {name}: {why}".format(**rest)


def shortened(text: str, length: int = 180) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
