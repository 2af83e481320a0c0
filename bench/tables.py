"""python -m bench.tables: write the tables of README.md and docs/performance.md from bench/results/step.jsonl.

What stands between <!-- bench:NAME --> and <!-- /bench:NAME --> is written anew.  Of rows about the same thing the newest
counts.  Rows of a simulated GPU have no times: what they tell are bounds.
"""

import json
import re

from bench.peaks import PEAKS
from bench.records import RESULTS, ROOT, table
from bench.step.prices import CLASSES
from bench.steps import VARIANTS
from mimir_fast.checkpoints.atomic import write_text_atomically

PAGES = ("README.md", "docs/performance.md")
BLOCK = re.compile(r"(<!-- bench:([\w-]+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)
SIZES = {"ti": "Ti", "small": "S", "base": "B", "large": "L"}
SAME = "task variant peaks model batch_size input_size patch_size residual_dtype steps compile".split()
PUBLISHED_MFU = 0.229  # the highest among the trainings that docs/performance.md cites
BOUNDS = """model={model}; step={step}; for={gpu}; kernels + products + memsets={kernels} + {gemms} + {memsets}
issued by the host={issued}; host ms={host_ms}; host / bound={host_share}
waits={syncs}; GB={gb:.1f}; GB outside products and attention={gb_outside_gemm_attention:.1f}; product TFLOP={gemm_tflop:.1f}
peak GiB={peak_gib:.1f}; bound ms={bound_ms:.1f}; of which dense solves ms={solves_ms:.1f}; expected ms={expected_ms}
measured ms={ms}; configuration={setting}; record: device · CUDA driver · torch · Triton · commit · date={source}"""
SHARES = (
    f"model={{model}}; step={{step}}; {'; '.join(f'{kind}={{{kind}}}' for kind in CLASSES)}; configuration={{setting}}"
)
CEILINGS = """model={model}; step={step}; for={gpu}; bound ms={bound_ms:.1f}; images/s cannot exceed={rate:,.0f}
MFU cannot exceed={mfu:.0%}; images/s if a run reached 22.9% MFU (arithmetic, no forecast)={published}
configuration={setting}"""


def rows(task: str, peaks: str = "") -> list[dict]:
    """The newest row of each configuration with its figures by name; H100s first, then by size, attack and variant."""
    found = [json.loads(line) for line in (RESULTS / "step.jsonl").read_text().splitlines()]
    flat = [{"task": "pretrain"} | r["config"] | r for r in found]
    newest = {json.dumps([*(r[name] for name in SAME), bool(r["measured"])]): figures(r) for r in flat}
    chosen = [r for r in newest.values() if r["task"] == task and r["peaks"].startswith(peaks)]
    return sorted(chosen, key=lambda r: (r["peaks"] != "h100", r["size"], r["steps"], VARIANTS.index(r["variant"])))


def figures(r: dict) -> dict:
    """A row with everything that the tables name."""
    size, precision = r["model"].rpartition("_")[2], f"{r['precision']}, {r['residual_dtype']} residual"
    attack = f", PGD-{r['steps']}" if r["task"] == "finetune" else ""
    versions = f"driver {r.get('driver') or '—'} · torch {r['torch']} · Triton {r['triton']} · {r['commit']} · {r['date'][:10]}"
    peak = PEAKS[r["peaks"]].flops["bf16"] / 1e12
    tflop = r["classes"]["GEMM"]["tflop"] + r["classes"]["attention"]["tflop"]
    bound_ms = r["totals"]["bound_ms"]
    shares = {kind: f"{c['bound_ms']:.1f} ({c['bound_ms'] / bound_ms:.0%})" for kind, c in r["classes"].items()}
    how, host = "compiled" if r["compile"] else "eager", r.get("host")
    reached = f"{r['batch_size'] * PUBLISHED_MFU * peak / tflop:,.0f}"
    own = {
        "size": list(SIZES).index(size),
        "model": f"ViT-{SIZES[size]}/{r['patch_size']}",
        "step": r["variant"].replace("ours", "mimir_fast") + attack,
        "gpu": r["peaks"].upper(),
        "issued": host["issued"] if host else "—",
        "host_ms": f"{host['ms']:.2f}" if host else "—",
        "host_share": f"{host['share_of_bound']:.0%}" if host else "—",
        "expected_ms": f"{r['expected']['ms']:.0f}" if "expected" in r else "—",
        "solves_ms": bound_ms - r["totals"]["bound_without_solves_ms"],
        "ms": f"{r['measured']['ms']:.1f}" if r["measured"] else "unknown",
        "rate": r["batch_size"] / bound_ms * 1e3,
        "mfu": tflop / bound_ms * 1e3 / peak,
        "published": reached if r["peaks"] == "h100" else "—",  # their GPU
        "setting": f"batch {r['batch_size']}, {r['input_size']} px, {precision}, {how}",
        "source": f"{r['device'].replace('pretend-', 'simulated-')} · {versions}",
    }
    return r | r["totals"] | shares | own


def headline() -> str:
    """For the README: ViT-B's steps on an H100."""
    found = [r for task in ("pretrain", "finetune") for r in rows(task, "h100") if r["model"] == "ViT-B/16"]
    once = [f"{r['step']} ({r['setting']}) {r['bound_ms']:.1f} ms" for r in found if r["steps"] == 1]
    return f"Bounds of a ViT-B/16 step on an H100, no measurements: {'; '.join(once)}."


def rewritten(text: str) -> str:
    """A page with every block written anew; raises KeyError for a block that is not known."""
    blocks = {"headline": headline()}
    blocks["published"] = table(CEILINGS, [r for r in rows("pretrain") if r["variant"] == "ours"])
    for prefix, task in (("", "pretrain"), ("finetune-", "finetune")):
        blocks[f"{prefix}bounds"] = table(BOUNDS, rows(task))
        blocks[f"{prefix}shares"] = table(SHARES, rows(task, "h100"))
    return BLOCK.sub(lambda m: f"{m[1]}{blocks[m[2]]}\n{m[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        write_text_atomically(ROOT / page, rewritten((ROOT / page).read_text()), page)
