"""The tables of the docs: as the records have it, the newest row of each configuration, bounds called bounds."""

import json
import re

import pytest

from bench import tables
from bench.records import RESULTS, ROOT


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_pages_show_what_the_records_say(page):
    text = (ROOT / page).read_text()
    assert tables.rewritten(text) == text, "out of date: python -m bench.tables"


def recorded() -> dict:
    """The first fine-tuning row of ours on an A100."""
    rows = map(json.loads, (RESULTS / "step.jsonl").read_text().splitlines())
    return next(r for r in rows if (r.get("task"), r["variant"], r["peaks"]) == ("finetune", "ours", "a100"))


def cells(table: str, *names: str) -> list[list[str]]:
    heads, _, *body = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return [[line[heads.index(name)] for name in names] for line in body]


def test_the_newest_row_of_every_configuration_counts(monkeypatch, tmp_path):
    row = recorded()
    host = {"issued": 5, "ms": 0.5, "share_of_bound": 0.01}
    newer = row | {"commit": "new", "totals": row["totals"] | {"bound_ms": 100.0}, "host": host}
    smaller = row | {"config": row["config"] | {"batch_size": 128}}
    measured = {"ms": 200.0, "images_per_s": 1280.0, "mfu": 0.3, "share_of_bound": 0.5}
    found = [row, newer, smaller, newer | {"device": "NVIDIA A100-SXM4-80GB", "measured": measured}]
    (tmp_path / "step.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    table = tables.table(tables.BOUNDS, tables.rows("finetune"))
    shown = cells(table, "step", "bound ms", "measured ms")
    assert shown == [
        ["mimir_fast, PGD-1", *ms] for ms in (["100.0", "unknown"], ["175.8", "unknown"], ["100.0", "200.0"])
    ]
    ((source, first), *_) = cells(table, tables.BOUNDS.rpartition("; ")[2].partition("=")[0], "configuration")
    assert source.startswith("simulated-a100 · driver — · torch 2.14.1+cu130 · Triton 3.8.0 · new · 2026-11-28")
    assert first == "batch 256, 224 px, bf16, bf16 residual, compiled"
    assert cells(table, "issued by the host", "host ms", "host / bound")[:2] == [["5", "0.50", "1%"], ["—"] * 3]
    assert tables.rows("pretrain") == []


def test_what_a_bound_says_of_images_and_mfu():
    row = next(r for r in tables.rows("pretrain", "h100") if (r["variant"], r["model"]) == ("ours", "ViT-B/16"))
    rate, mfu, published = cells(
        tables.table(tables.CEILINGS, [row]), *re.findall(r"(images/s[^=]*|MFU[^=]*)=", tables.CEILINGS)
    )[0]
    tflop = row["classes"]["GEMM"]["tflop"] + row["classes"]["attention"]["tflop"]
    seconds = row["totals"]["bound_ms"] / 1e3
    assert (rate, mfu) == (f"{512 / seconds:,.0f}", f"{tflop / seconds / 989:.0%}")
    assert published == f"{512 / (tflop / (0.229 * 989)):,.0f}"


def test_a_block_that_nobody_writes_is_an_error():
    with pytest.raises(KeyError, match="speed"):
        tables.rewritten("<!-- bench:speed -->\n<!-- /bench:speed -->\n")
