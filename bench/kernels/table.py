"""Records of cases for people."""

from collections.abc import Iterator

GONE = "-"
COLUMNS = "{:<12} {:<9} {:>10} {:>10} {:>10} {:>8} {:>9} {:>6}  {}".format


def head() -> str:
    return COLUMNS("impl", "direction", "ms", "20th", "80th", "GB/s", "TFLOP/s", "peak", "")


def line(record: dict) -> str:
    """One implementation in one direction."""
    share = record["share of peak"]
    times = [_number(record[name], ".4f") for name in ("ms", "ms_p20", "ms_p80")]
    rates = [_number(record[name], ".4g") for name in ("GB/s", "TFLOP/s")]
    said = record["why"] if record["status"] == "ok" else f"{record['status']}: {record['why']}".removesuffix(": ")
    if record["kernel ms"] is not None:
        said = f"kernels alone {record['kernel ms']:.4f} ms"
    return COLUMNS(
        record["impl"], record["direction"], *times, *rates, GONE if share is None else f"{share:.0%}", said
    ).rstrip()


def verdicts(records: list[dict]) -> Iterator[str]:
    """Ours against the fastest of the others, per case and direction, where both have a time."""
    groups: dict[str, dict[str, dict]] = {}
    for r in records:
        if r["status"] == "ok":
            sizes = " ".join(f"{name}{size}" for name, size in r["config"].items())
            groups.setdefault(f"{r['op']} {r['dtype']} {sizes} {r['direction']}", {})[r["impl"]] = r
    for name, found in groups.items():
        ours = found.pop("ours", None)
        if ours and found:
            best = min(found.values(), key=lambda r: r["ms"])
            share = "" if ours["share of peak"] is None else f", {ours['share of peak']:.0%} of the measured peak"
            ratio = best["ms"] / ours["ms"]
            yield f"{name}: {ours['ms']:.4f} ms{share}; {ratio:.2f} x the speed of {best['impl']} ({best['ms']:.4f} ms)"


def _number(value: float | None, digits: str) -> str:
    return GONE if value is None else format(value, digits)
