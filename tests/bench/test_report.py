"""python -m bench report: this repository's own page, what gets into a table, pretend GPUs, markers, plots, conversions."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.__main__ import main
from bench.report import plots
from bench.report.field import PUBLISHED, published_table
from bench.report.figures import Measurement
from bench.rows import load
from tests.bench.records import H100, TRAINER, kernel, losses, pairs, step, training

ROOT = Path(__file__).parents[2]
PAGE = "docs/performance.md"
BF16 = TRAINER | {"residual_dtype": "bf16"}


@pytest.fixture
def draw(tmp_path, capsys):
    """Write the report of some records into a copy of the pages; gives the exit status, what was printed, the page."""
    root, results = tmp_path / "root", tmp_path / "results"
    (root / "docs").mkdir(parents=True)
    results.mkdir()
    for name in ("README.md", PAGE):
        shutil.copy(ROOT / name, root / name)

    def run(records: list[dict], *words: str) -> tuple[int, str, str]:
        (results / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        status = main(["report", "--root", str(root), "--results", str(results), *words])
        shown = capsys.readouterr()
        return status, shown.out + shown.err, (root / PAGE).read_text()

    run.root = root
    return run


def block(page: str, name: str) -> str:
    return re.search(rf"<!-- bench:{name} -->\n(.*?)<!-- /bench:{name} -->", page, re.DOTALL)[1]


def table(page: str, name: str) -> list[dict[str, str]]:
    """The rows of a block's first table by their heads."""
    lines = [line.strip("| ").split(" | ") for line in block(page, name).splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], cells)) for cells in lines[2:]]


def test_this_repository_shows_what_its_records_say(capsys):
    assert main(["report", "--check"]) == 0, capsys.readouterr().out


def test_no_pretend_gpu_outside_of_a_table_of_bounds():
    page = (ROOT / PAGE).read_text()
    assert "pretend-" in block(page, "bounds")
    for name in re.findall(r"<!-- bench:([\w-]+) -->", page):
        if "pretend-" in block(page, name):
            assert "**Bounds, not measurements**" in block(page, name), name


def test_a_new_record_makes_the_pages_stale_until_they_are_written(draw):
    assert draw([step(40.0, config=BF16)])[0] == 0
    before = [(draw.root / name).read_text() for name in ("README.md", PAGE)]
    newer = [step(40.0, config=BF16), step(38.5, config=BF16, commit="b2", date="2026-12-01T00:00:00+00:00")]
    status, text, _ = draw(newer, "--check")
    assert status == 1
    stale = {line.removeprefix("stale: ") for line in text.splitlines() if line.startswith("stale")}
    assert stale == {"README.md", PAGE, "docs/plots/roofline.svg", "docs/plots/shares.svg"}
    assert [(draw.root / name).read_text() for name in ("README.md", PAGE)] == before
    status, text, page = draw(newer)
    assert (status, text.count("written: ")) == (0, 4)
    assert [row["bound ms"] for row in table(page, "bounds")] == ["38.5"]
    assert (
        "): 38.5 ms. A bound is no measurement. Measured on a GPU: nothing yet."
        in (draw.root / "README.md").read_text()
    )
    assert draw(newer, "--check")[:2] == (0, "")
    outside = re.compile(r"(<!-- bench:[\w-]+ -->\n).*?(<!-- /)", re.DOTALL)
    assert outside.sub(r"\1\2", page) == outside.sub(r"\1\2", before[1])


def test_the_newest_row_of_every_variant_gpu_and_configuration(draw):
    old, late = "2026-01-01T00:00:00+00:00", "2026-12-01T00:00:00+00:00"
    other = [step(98.0, peaks="a100", device="pretend-a100"), step(80.0, variant="textbook")]
    dropped = step(2, variant="textbook", commit="a0", date=old)
    wider = step(45.0, config=TRAINER | {"mask_ratio": 0.6})
    page = draw([step(40.0), step(39.0, commit="b2", date=late), dropped, *other, wider])[2]
    found = {(row["step"], row["for"], row["bound ms"], row["configuration"][:12]) for row in table(page, "bounds")}
    expected = {("mimir_fast", "H100", "39.0"), ("mimir_fast", "H100", "45.0"), ("mimir_fast", "A100", "98.0")}
    assert {cells[:3] for cells in found} == expected | {("textbook", "H100", "80.0")}
    assert len(table(draw([step(41.0), step(40.0, ms=50.0, date=late)])[2], "bounds")) == 1  # wherever it was priced
    settings = {row["bound ms"]: row["configuration"] for row in table(page, "bounds")}
    assert settings["45.0"] == "batch 512, 224 px, bf16, fp32 residual, compiled, mask_ratio 0.6"
    assert settings["39.0"].endswith("compiled, mask_ratio 0.75")
    assert settings["98.0"].endswith("compiled")


def test_every_row_says_where_it_comes_from(draw):
    rows = [step(ms=50.0), step(), training(110.0, 1.0, 1.4), pairs([1.9, 2.0, 2.1]), kernel(1.0, 0.9, 1.1)]
    del rows[1]["driver"]  # of before the driver was recorded
    rows[1]["variant"] = "textbook"
    page = draw(rows)[2]
    for name in ("bounds", "steps", "training", "pairs", "kernels"):
        for row in table(page, name):
            (source,) = [cell for head, cell in row.items() if head.startswith("record: ")]
            device, driver, *rest = source.split(" · ")
            assert device == ("pretend-h100" if row.get("step") == "textbook" else "cpu" if "cpu" in device else H100)
            assert driver == ("driver —" if device == "pretend-h100" else "driver 13.0")
            assert rest == ["torch 2", "Triton 3", "a1", "2026-11-23"]
            assert name == "kernels" or row["configuration"].startswith("batch ")
    assert table(page, "steps")[0]["ms"] == "50.00"
    assert table(page, "training")[0]["images/s (20th to 80th percentile)"] == "110.0 (91.4 to 128.0)"
    assert table(page, "pairs")[0]["measured on"] == "a CPU, 2 threads"
    assert table(page, "pairs")[0]["ratio (20th to 80th percentile)"] == "2.00 (1.94 to 2.06)"
    assert table(page, "kernels")[0]["ours ms"] == "1 (0.9 to 1.1)"


@pytest.mark.parametrize(
    "record",
    [
        step(ms=50.0, device="pretend-h100"),
        kernel(1.0, device="pretend-h100"),
        training(110.0, 1.0, 1.4, device="pretend-h100"),
        pairs([2.0, 2.1], device="pretend-h100"),
        losses(0.8, 0.9, device="pretend-h100"),
    ],
    ids=["step", "kernels", "train", "pairs", "losses"],
)
def test_a_pretend_gpu_gets_into_no_table_of_measurements(draw, record):
    status, text, page = draw([step(), record])
    assert status == 2
    assert "rows.jsonl:2: pretend-h100 has no times" in text
    assert page == (ROOT / PAGE).read_text()  # nothing was written


def test_a_measurement_refuses_a_pretend_gpu_itself(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(kernel(1.0)) + "\n" + json.dumps(kernel(1.0, device="pretend-a100")) + "\n")
    real, pretend = load(file)
    assert Measurement(real, real.readings["ms"]).on_gpu
    with pytest.raises(ValueError, match=r"rows.jsonl:2: pretend-a100 has no times"):
        Measurement(pretend, pretend.readings["ms"])


def test_pretend_rows_without_times_are_passed_over(draw):
    silent = kernel(1.0, device="pretend-h100") | {"ms": None}
    empty = training(1.0, 1.0, 1.0, device="pretend-h100") | {"images/s": None, "percentiles": None}
    status, _, page = draw([step(), silent, empty])
    assert status == 0
    assert "No GPU row exists" in block(page, "kernels")
    assert "is on record" in block(page, "training")


def test_rivals_are_drawn_from_gpu_rows_only(draw):
    plot = draw.root / "docs" / "plots" / "rivals.svg"
    page = draw([step(), kernel(1.0, 0.9, 1.1, device="cpu")])[2]
    assert "No GPU row exists" in block(page, "kernels")
    assert "rivals.svg" not in page
    assert not plot.exists()
    measured = [
        kernel(2.0, 1.9, 2.1),
        kernel(3.0, 2.8, 3.2, impl="torch.compile"),
        kernel(9.0, device="cpu", impl="eager"),
    ]
    page = draw([step(), *measured])[2]
    (row,) = table(page, "kernels")
    assert (row["ours ms"], row["torch.compile ms"]) == ("2 (1.9 to 2.1)", "3 (2.8 to 3.2)")
    assert "eager" not in block(page, "kernels")
    assert "](plots/rivals.svg)" in page
    drawn = plot.read_text()
    assert "torch.compile" in drawn
    assert f"Kernels of imagenet_vit_b on {H100}, measured" in drawn
    assert "removed: docs/plots/rivals.svg" in draw([step()])[1]
    assert not plot.exists()


def test_rivals_are_multiples_of_ours(tmp_path):
    file = tmp_path / "rows.jsonl"
    records = [kernel(2.0, 1.8, 2.2), kernel(3.0, 2.8, 3.2, impl="eager"), kernel(1.0, device="NVIDIA A100")]
    file.write_text("\n".join(map(json.dumps, [*records, kernel(5.0, op="alone", impl="eager")])))
    cases = plots.rivals_numbers(load(file))["cases"]
    assert list(cases) == [f"mlp, encoder, bf16, forward, B512 D768, {device}" for device in ("NVIDIA A100", H100)]
    assert cases[f"mlp, encoder, bf16, forward, B512 D768, {H100}"]["times"]["eager"] == pytest.approx([1.5, 1.4, 1.6])


def test_a_plot_shows_its_numbers_and_nothing_of_the_day(draw):
    records = [step(40.0, config=BF16), step(80.0, variant="textbook", config=TRAINER | {"compile": False})]
    draw(records)
    files = [draw.root / "docs" / "plots" / f"{name}.svg" for name in ("roofline", "shares")]
    first = [file.read_text() for file in files]
    for file, text in zip(files, first):
        ElementTree.fromstring(text)
        assert len(text) < 60_000
        assert "bound, not measured" in text
        assert "<dc:date>" not in text
        file.unlink()
    assert all(figure in first[1] for figure in ("40.0 ms", "80.0 ms", "eager"))
    assert "all GEMM: 20.0 ms" in first[0]
    assert draw(records, "--check")[1].count("stale: docs/plots") == 2  # missing
    draw(records)
    assert [file.read_text() for file in files] == first
    files[1].write_text(first[1].replace("40.0 ms", "20.0 ms"))
    assert draw(records, "--check")[:2] == (
        1,
        "stale: docs/plots/shares.svg\npython -m bench report writes them anew\n",
    )


def without(text: str) -> Callable[[str], str]:
    return lambda page: page.replace(text, "", 1)


@pytest.mark.parametrize(
    "edit",
    [
        without("<!-- bench:pairs -->\n"),
        without("<!-- /bench:pairs -->"),
        without("<!-- bench:pairs -->\n<!-- /bench:pairs -->"),
        lambda page: page + "<!-- bench:speed -->\n<!-- /bench:speed -->\n",
        lambda page: page + "<!-- bench:pairs -->\n<!-- /bench:pairs -->\n",
        lambda page: page + "<!-- /bench:pairs -->\n",
    ],
    ids=["opening", "closing", "both", "unknown", "twice", "stray"],
)
def test_markers_that_do_not_fit_are_refused(draw, edit):
    page = re.sub(
        r"(<!-- bench:pairs -->\n).*?(<!-- /bench:pairs)", r"\1\2", (ROOT / PAGE).read_text(), flags=re.DOTALL
    )
    (draw.root / PAGE).write_text(edit(page))
    status, text, _ = draw([step()])
    assert (status, text.count("\n")) == (2, 1)
    assert f"{PAGE}: markers: expected one pair" in text


def test_wrong_input_is_one_line(draw, capsys):
    status, text, _ = draw([{"kind": "weather"}])
    assert (status, "rows.jsonl:1: a row of no known kind" in text) == (2, True)
    assert main(["report", "--results", str(draw.root / "nowhere")]) == 2
    assert "results: no folder" in capsys.readouterr().err


def test_published_figures_in_images_per_second_and_gpu(tmp_path):
    rates = {p.what: p.rate for p in PUBLISHED}
    assert rates["MAE ViT-L/16"] == pytest.approx(1_281_167 * 800 / 151_200 / 64)
    assert rates["DailyMAE ViT-B/16"] == pytest.approx(1977.2, abs=0.1)
    assert all(p.source.startswith("[") and "](https://" in p.source for p in PUBLISHED)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [step(40.0, config=BF16), step(80.0, variant="textbook")])))
    text = "\n".join(published_table(load(file)))
    assert "bounds, not measurements, and no throughput" in text
    ours = next(line for line in text.splitlines() if "mimir_fast" in line).strip("| ").split(" | ")
    # 512 images in 40 ms at least; 20 TFLOP in 40 ms of a peak of 989 TFLOP/s; the same at the published MFU
    rate = 512 / (20 / (0.229 * 989))
    assert ours[3:7] == ["40.0", "12,800", f"{20 / 0.040 / 989:.0%}", f"{rate:,.0f}"]
    assert "textbook" not in text


def test_status_tells_measured_from_bounds_from_unknown(draw):
    def states(*records: dict) -> dict[str, tuple[str, str]]:
        return {row["figure"][:30]: (row["state"], row["on what"]) for row in table(draw(list(records))[2], "status")}

    found = states(step(), pairs([2.0]), losses(0.8, 0.9))
    assert found["least time, bytes, FLOPs, laun"] == (
        "bound",
        "priced for H100; run on a simulated GPU",
    )
    assert found["time of a step on a GPU, image"] == ("unknown", "no row on record")
    assert found["step against the textbook step"][0] == "unknown"  # the last of two: the GPU's
    assert found["training loss in 16 bits, a CP"] == ("measured", "cpu")
    measured = states(step(ms=50.0), training(110.0, 1.0, 1.4), pairs([2.0]))
    assert measured["time of a step on a GPU, image"] == ("measured", H100)
    assert states()["least time, bytes, FLOPs, laun"] == ("unknown", "no row on record")


def test_losses_are_told_with_their_spread(draw):
    page = draw([step(), losses(0.8, 0.9)])[2]
    assert block(page, "losses").startswith("`python -m bench losses --data_root FOLDER -- --lr 1`; cpu · driver 13.0")
    assert table(page, "losses") == [
        {"updates": "1–20", "fp32, seeds 0 to 1": "1.000 / 1.000", "bf16, seed 0": "1.000"},
        {"updates": "21–40", "fp32, seeds 0 to 1": "0.800 / 0.900", "bf16, seed 0": "0.800"},
    ]
    assert "at most 0.100, by 0.050 on average; 16 bits move them: bf16 by at most 0.030 (0.010)." in page
