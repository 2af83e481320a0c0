"""The record of a priced step as text."""

from collections.abc import Iterator

TOTALS = """kernels + GEMMs + memsets {kernels} + {gemms} + {memsets} = {launches}; syncs {syncs}; copies to host {to_host}
{gb:.1f} GB in all, {gb_outside_gemm_attention:.1f} GB outside GEMM and attention; GEMM {gemm_tflop:.2f} TFLOP; \
peak {peak_gib:.2f} GiB; bound {bound_ms:.1f} ms ({bound_without_solves_ms:.1f} ms without dense solves)"""
MEASURED = "measured {ms:.2f} ms, {images_per_s:.0f} images/s, MFU {mfu:.1%}, {share_of_bound:.1%} of the bound's speed"
LENGTH = 180  # of a line


def lines(record: dict) -> Iterator[str]:
    yield "{:<12}{:>7}{:>10}{:>9}{:>10}".format("class", "calls", "GB", "TFLOP", "bound ms")
    for kind, part in record["classes"].items():
        yield "{:<12}{count:>7}{gb:>10.2f}{tflop:>9.3f}{bound_ms:>10.2f}".format(kind, **part)
    bound = "{count:>5}{gb:>8.2f}{bound_ms:>8.2f}  {name}"
    if record["top"]:
        yield f"\nthe {len(record['top'])} most expensive Inductor kernels (calls, GB, bound ms, made from)"
    for top in record["top"]:
        yield bound.format(**top)
        yield f"{'':23}{top['nodes'][:LENGTH]}"
    yield "\nour operations, priced by their contracts (calls, GB, bound ms)"
    for name, row in record["ours"].items():
        yield bound.format(name=name, **row)
    yield "\nother ATen, priced by input plus output bytes (calls, GB)"
    for rest in record["remainder"]:
        yield "{count:>5}{gb:>9.3f}  {name}".format(**rest)
    yield "\nunpriced in part or in whole: " + ("nothing" if not record["unpriced"] else "")
    for rest in record["unpriced"]:
        yield "{count:>5}{gb:>9.3f}  {name}: {why}".format(**rest)
    yield "\n" + TOTALS.format(**record["totals"])
    if record["measured"]:
        yield MEASURED.format(**record["measured"])
