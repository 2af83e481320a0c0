"""The report: self-contained, right to the pixel, and calm about what is missing, cut or not a number."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mimir_fast.cli.report import main
from mimir_fast.report.figures import draw_reconstructions, grid_images, smooth, thin
from mimir_fast.report.run_page import read_lines, reconstructions, write_report


def row(update: int, **values) -> dict:
    base = {"update": update, "epoch": update / 10, "x": 100 * update, "loss": 1.0, "recon": 0.9, "mi": 7.0, "lr": 1e-3}
    base |= {"grad_norm": 0.5, "images_per_s": 100.0, "data_wait": 0.1, "peak_memory_gib": 1.5}
    return base | {"skipped_penalties": 0, "skipped_steps": 0} | values


def make_run(folder, rows, samples=True, config="model: mae_vit_ti\ndataset: digits\n"):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if config:
        (folder / "config.yaml").write_text(config)
        (folder / "log.txt").write_text(json.dumps({"epoch": 0, "train_loss": 1.0, "bad_files": 3}) + "\n")
    if samples:
        clean = np.random.default_rng(0).random((2, 3, 8, 8), np.float32) * 0.5 + 0.25
        adv = clean + np.float32(4 / 255)
        where = {"patch_size": 4, "epoch": 0, "update": 5, "eps_255": 4.0}
        mask = np.array([[1, 0, 1, 1], [0, 1, 1, 1]], np.float32)
        np.savez(folder / "samples.npz", clean=clean, adv=adv, recon=clean * 0, mask=mask, **where)
    return folder


def test_page_is_self_contained_and_figures_decode(tmp_path):
    page = write_report(make_run(tmp_path / "run", [row(i, recon=1 / i) for i in range(1, 40)]))
    text = page.read_text()
    assert page == tmp_path / "run" / "report.html"
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r'src="data:[^"]*"', "", text)
    for name in ("loss", "penalty", "lr", "throughput", "reconstructions"):
        with Image.open(page.parent / "report" / f"{name}.png") as image:
            assert image.size[0] > 500
    assert "1 → 0.02564" in text
    assert "4.00/255" in text
    assert "mae_vit_ti on digits" in text
    assert not list(page.parent.glob("*.tmp"))


def test_page_of_a_fine_tuning(tmp_path):
    keys = ("update", "epoch", "x", "loss", "lr", "images_per_s", "data_wait", "peak_memory_gib", "skipped_steps")
    run = make_run(tmp_path / "run", [{key: row(i)[key] for key in keys} for i in range(1, 9)], samples=False)
    assert "None in this run" not in re.sub(r'src="[^"]*"', "", write_report(run).read_text()).split("Accuracy")[0]
    assert "None in this run" in write_report(run).read_text()  # no epoch was rated
    log = [{"epoch": e, "test_acc1": 50.0 + e, "robust_acc1": 40.0 if e else None, "bad_files": 0} for e in range(2)]
    (run / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in log))
    text = write_report(run).read_text()
    assert "None in this run" not in text
    assert "Fine-tuning" in text
    for words in ("<th>test_acc1 [%], last</th><td>51</td>", "<th>robust_acc1 [%], last</th><td>40</td>"):
        assert words in text
    assert "reconstruction" not in re.sub(r'src="[^"]*"', "", text)


def test_grid_to_the_pixel():
    clean = np.full((1, 3, 4, 4), 0.5, np.float32)
    adv = clean + 0.02
    samples = {"clean": clean, "adv": adv, "recon": clean * 0.2, "mask": np.array([[1, 0, 0, 1]]), "patch_size": 2}
    shown = grid_images(samples)
    assert shown.shape == (1, 5, 4, 4, 3)
    flat = shown[0, ..., 0]
    assert np.allclose(flat[0], 0.5)
    assert np.allclose(flat[1], 0.52)
    assert np.allclose(flat[2], 0.7)
    removed = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], bool)
    assert np.allclose(flat[3], np.where(removed, 0.5, 0.52))
    assert np.allclose(flat[4], np.where(removed, 0.1, 0.52))


def test_repeated_and_cut_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 2, "v": 1}\n{"update": 1, "v": 2}\n{"update": 2, "v": 3}\nnull\n{"upd')
    rows, skipped = read_lines(path, "update")
    assert [(r["update"], r["v"]) for r in rows] == [(1, 2), (2, 3)]
    assert skipped == 2
    run = make_run(tmp_path / "run", [row(1), row(2)])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"update": 3, "lo')
    assert "1 unreadable line" in write_report(run).read_text()


@pytest.mark.parametrize(
    "rows",
    [
        [row(1)],
        [row(1, mi=None), row(2, mi=None)],
        [row(i, loss=None, recon=float("nan"), mi=None if i % 2 else 3.0) for i in range(1, 9)],
        [row(1, images_per_s=None, data_wait=None, loss=float("inf"))],
    ],
)
def test_strange_values(tmp_path, rows):
    text = write_report(make_run(tmp_path / "run", rows, samples=False, config="")).read_text()
    assert ("None in this run" in text) == all(r["mi"] is None for r in rows)
    assert "No readable samples.npz yet" in text
    assert "No readable config.yaml" in text


def test_text_from_files_is_escaped(tmp_path):
    config = 'model: "<script>alert(1)</script>"\ndataset: "a & b"\n'
    text = write_report(make_run(tmp_path / "run", [row(1)], config=config)).read_text()
    assert "<script>" not in text
    assert "a &amp; b" in text


def test_errors_are_one_line_and_status_2(tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    assert main([str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "metrics.jsonl" in err
    assert len(err.strip().splitlines()) == 1
    assert main([str(make_run(tmp_path / "run", [row(1)]))]) == 0


def test_thinning_and_smoothing():
    x = np.arange(100_001.0)
    y = np.where(x % 3 == 0, np.nan, x)
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= 2000
    assert np.allclose(thin_x, thin_y, atol=2)
    assert np.allclose(smooth(np.full(50, 2.0)), 2.0)
    assert smooth(np.array([np.nan, 1.0])).tolist()[1] == 1.0


def test_damaged_side_files_are_said_in_their_place(tmp_path):
    run = make_run(tmp_path / "run", [row(1), row(2, skipped_penalties=1)])
    (run / "samples.npz").write_bytes((run / "samples.npz").read_bytes()[:300])
    (run / "config.yaml").write_text("a: [")
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"update": "three"}\n\xff\n')
    text = write_report(run).read_text()
    assert "No readable samples.npz" in text
    assert "No readable config.yaml" in text
    assert "2 unreadable line(s)" in text
    (run / "samples.npz").write_bytes(b"")
    write_report(run)


def test_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    run = make_run(tmp_path / "run", [row(1)])
    (run / "report").write_text("in the way")
    assert main([str(run)]) == 1
    assert "report" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["nothing_of_the_kind", "module://not.there"])
def test_figures_are_drawn_whatever_backend_the_environment_names(backend):
    """Planted: Matplotlib is imported as it is, and refuses an unknown MPLBACKEND."""
    code = "from mimir_fast.report.figures import axes; import io; axes('loss')[0].savefig(io.BytesIO(), format='png')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MPLBACKEND": backend}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_samples_without_an_attack_say_so_and_have_no_grey_panels(tmp_path):
    """Planted: the caption names the attack's radius, whose panels are all grey."""
    images = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    samples = {"clean": images, "adv": images, "recon": images, "mask": np.eye(2, 4), "patch_size": np.array(4)}
    samples |= {"update": np.array(3), "eps_255": np.array(8.0)}
    titles = [ax.get_title() for ax in draw_reconstructions(samples).axes]
    assert [title for title in titles if title] == ["clean", "visible patches", "reconstruction"]
    assert len(titles) == 6
    words = reconstructions(tmp_path, samples)
    assert "Update 3. No attack; grey patches" in words
    assert "255" not in re.sub('src="[^"]*"', "", words)
    words = reconstructions(tmp_path, samples | {"adv": images + 0.01})
    assert "each pixel by 8/255" in words
