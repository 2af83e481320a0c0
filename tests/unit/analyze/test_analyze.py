"""mimir-fast analyze from the command line to its files, and the attack behind its numbers."""

import argparse
import json

import pytest
import torch

from mimir_fast.analyze import analysis as command
from mimir_fast.analyze.plot import draw
from mimir_fast.analyze.seen import Perturbation, attack_reconstruction, look
from mimir_fast.analyze.time_left import TimeLeft
from mimir_fast.attacks.named import start_noise
from mimir_fast.attacks.pgd_mae import ascend_reconstruction, linf_bounds
from mimir_fast.checkpoints.trained_models import latent_tokens, load_classifier, load_mae
from mimir_fast.cli.analyze import main
from mimir_fast.config.analysis import AnalyzeConfig
from mimir_fast.evaluate.progress import Bar
from mimir_fast.models import create_classifier, create_model
from mimir_fast.models.families.vit import VIT

SIZE = {"img_size": 32, "patch_size": 8}
EPS = 8 / 255


@pytest.fixture(scope="module", autouse=True)
def _nano():
    """A named architecture that is quick to build."""
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VIT.sizes, "vit_nano", sizes)
        yield


@pytest.fixture(scope="module")
def runs(_nano, tmp_path_factory):
    """pre/checkpoint-{3,20}.pth of pre-training, one of them normalised, and fine.pth of fine-tuning; handwritten digits."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "pre").mkdir()
    torch.manual_seed(0)
    for epoch in (20, 3):
        args = {"model": "mae_vit_nano", "dataset": "digits", "norm_pix_loss": True, "use_normalize": epoch == 3}
        state = {"model": create_model("mae_vit_nano", **SIZE).state_dict(), "epoch": epoch}
        torch.save({**state, "args": argparse.Namespace(**args)}, folder / "pre" / f"checkpoint-{epoch}.pth")
    args = {"model": "vit_nano", "dataset": "digits", "eps": 4 / 255}
    state = {"model": create_classifier("vit_nano", num_classes=10, **SIZE).state_dict(), "epoch": 1}
    torch.save({**state, "args": argparse.Namespace(**args)}, folder / "fine.pth")
    torch.save(state["model"], folder / "bare.pth")
    return folder


def analyze(out, *words) -> int:
    return main([*map(str, words), "--device", "cpu", "--num_images", "40", "--steps", "2", "--output_dir", str(out)])


def numbers(out) -> dict:
    return json.loads((out / "analysis.json").read_text())


@pytest.fixture(scope="module")
def analyzed(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    assert analyze(out, "--checkpoint", runs / "pre", runs / "fine.pth", "--batch_size", 40) == 0
    return out


def test_everything_is_written(analyzed, runs):
    state = numbers(analyzed)
    assert state["complete"]
    found = state["checkpoints"]
    assert [c["checkpoint"].split("/")[-1] for c in found] == ["checkpoint-3.pth", "checkpoint-20.pth", "fine.pth"]
    assert [c["series"] for c in found] == [str(runs / "pre")] * 2 + ["checkpoints"]
    for checkpoint in found:
        for known in checkpoint["information"].values():
            for parts in known.values():
                excess, (low, high) = parts["excess"]["value"], parts["excess"]["interval"]
                assert low < excess < high
                assert excess == pytest.approx(parts["value"]["value"] - parts["null"]["value"])
    assert found[2]["attack"] == {"eps": 4.0, "alpha": 1.0, "steps": 2, "seed": 0}  # as the checkpoint was trained
    assert found[0]["attack"]["alpha"] == 10.0
    assert found[0]["fano"] == {}
    assert set(found[2]["fano"]) == {"clean", "adversarial"}
    assert (analyzed / "analysis.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (analyzed / "analysis.svg").read_text()


def test_repeats_bitwise_and_batches_do_not_matter(analyzed, runs, tmp_path):
    assert analyze(tmp_path, "--checkpoint", runs / "fine.pth", "--batch_size", 40) == 0
    first, again = numbers(analyzed)["checkpoints"][2], numbers(tmp_path)["checkpoints"][0]
    assert again == first
    assert analyze(tmp_path, "--checkpoint", runs / "pre" / "checkpoint-3.pth", "--batch_size", 7) == 0
    whole, parts = numbers(analyzed)["checkpoints"][0], numbers(tmp_path)["checkpoints"][0]
    for name in ("x", "x_adv"):
        values = [c["information"][name]["renyi_2"]["value"]["value"] for c in (whole, parts)]
        assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_another_seed_is_another_slice(analyzed, runs, tmp_path, capsys):
    assert analyze(tmp_path, "--checkpoint", runs / "fine.pth", "--seed", 1) == 0
    first, other = numbers(analyzed)["checkpoints"][2], numbers(tmp_path)["checkpoints"][0]
    assert other["entropy"] != first["entropy"]
    text = capsys.readouterr().out
    for word in ("I(delta;z)", "H(z)", "it is no proof", "I(y;prediction) >="):
        assert word in text


def test_figure(analyzed):
    """Every panel has its lines, and every point its interval."""
    found = numbers(analyzed)["checkpoints"]
    figure = draw(found)
    axes = [ax for row in figure.subfigs for ax in row.axes]
    assert len(axes) == 8
    assert [len(ax.containers) for ax in axes] == [3, 3, 3, 1, 3, 3, 3, 3]
    assert axes[0].get_xlabel() == "epoch"
    assert [label.get_text() for label in axes[4].get_xticklabels()] == ["fine"]
    for ax, estimator in zip(axes, ("nhsic", "renyi_1.01", "renyi_2")):
        line, _, (bars,) = ax.containers[0]
        excess = [c["information"]["x"][estimator]["excess"] for c in found[:2]]
        assert list(line.get_ydata()) == [e["value"] for e in excess]
        for segment, one in zip(bars.get_segments(), excess):
            assert segment[:, 1] == pytest.approx(one["interval"])


def test_files_of_one_folder_do_not_overwrite_each_other(runs):
    def folder(*files):
        return command.output_folder(AnalyzeConfig().updated({"checkpoint": tuple(map(str, files))}))

    pre = runs / "pre"
    assert folder(pre / "checkpoint-3.pth") == pre / "analysis" / "checkpoint-3"
    assert folder(pre / "checkpoint-3.pth", pre / "checkpoint-20.pth") == folder(pre) == pre / "analysis"
    assert folder("https://example.org/a/b.pth?v=1").parts == ("analysis", "b")


def test_as_many_images_as_there_are(runs, monkeypatch):
    trained = load_classifier(runs / "fine.pth")
    stream, numbers = command.images(AnalyzeConfig(), trained)
    assert numbers.tolist() == list(range(297))
    assert stream.num_images == 297
    monkeypatch.setattr(command, "GROUPS", 150)
    with pytest.raises(ValueError, match="num_images: got 297 images in all, expected 300 or more"):
        command.images(AnalyzeConfig(), trained)


def test_ctrl_c_keeps_what_is_done(runs, tmp_path, monkeypatch, capsys):
    whole, calls = command.analyzed, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(command, "analyzed", interrupted)
    assert analyze(tmp_path, "--checkpoint", runs / "pre") == 130
    state = numbers(tmp_path)
    assert not state["complete"]
    assert len(state["checkpoints"]) == 1
    assert (tmp_path / "analysis.png").exists()
    assert "stopped after 1 of 2 checkpoints" in capsys.readouterr().err


def test_wrong_input_is_told_in_one_line(runs, tmp_path, capsys):
    classes = create_classifier("vit_nano", num_classes=7, **SIZE)
    torch.save(classes.state_dict(), tmp_path / "seven.pth")
    for words, message in {
        (): "checkpoint: got none",
        ("--checkpoint", tmp_path): "no checkpoint-*.pth in the folder",
        ("--checkpoint", tmp_path / "absent.pth"): "no file",
        ("--checkpoint", runs / "bare.pth"): "does not say what it was trained on; pass --dataset",
        ("--checkpoint", runs / "fine.pth", "--eps", 0.031): "eps: got 0.031, expected 0.25 to 255, in 1/255",
        ("--checkpoint", runs / "fine.pth", "--model", "vit_base"): "the command line says vit_base",
        ("--checkpoint", runs / "fine.pth", "--num_images", 39): "num_images: got 39, expected 40 or more",
        ("--checkpoint", tmp_path / "seven.pth", "--dataset", "digits"): "7",
    }.items():
        assert main([*map(str, words), "--device", "cpu", "--output_dir", str(tmp_path / "out")]) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("mimir-fast analyze: error: ")
        assert message in error
        assert error.count("\n") == 1


def slice_of_images(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8), torch.arange(count) + 100


@pytest.mark.parametrize("epoch", [20, 3])
def test_attack_on_reconstruction(runs, epoch):
    """In pixels whatever the training normalised: within eps, most pixels at it; and the attack of pre-training."""
    trained = load_mae(runs / "pre" / f"checkpoint-{epoch}.pth")
    images, numbers = slice_of_images()
    x = images.float() / 255
    adv = attack_reconstruction(trained, x, numbers, Perturbation(8, 10, 1, seed=2))
    delta = (adv - x).abs()
    assert delta.max() <= EPS + 1e-6
    assert (delta > EPS - 1e-4).float().mean() > 0.4
    assert 0 <= adv.min() <= adv.max() <= 1
    if epoch == 20:  # in [0,1]
        start, mask = start_noise(numbers, x.shape[1:], 2) * EPS, start_noise(numbers, torch.Size([16]), 2, 1)
        expected = ascend_reconstruction(
            trained.model, x, linf_bounds(EPS, 10 / 255, 0, 1, 3, "cpu"), 1, 0.75, start, [mask]
        )
        torch.testing.assert_close(adv, expected, rtol=0, atol=1e-6)


def test_what_is_seen_of_a_classifier(runs):
    trained = load_classifier(runs / "fine.pth")
    images, numbers = slice_of_images()
    with torch.no_grad():
        labels = trained.model(images.float() / 255).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    seen = look(trained, batches, numbers, Perturbation(16, 4, 10))
    assert seen.right.tolist() == [False, True, True, True, True, True]
    assert seen.right_adv.sum() < seen.right.sum()  # an untrained model gives way
    assert torch.equal(seen.x, images.flatten(1).float() / 255)
    adv = seen.x_adv.view_as(images)
    with torch.no_grad():
        torch.testing.assert_close(seen.latent, latent_tokens(trained, adv).flatten(1), rtol=1e-4, atol=1e-5)
        assert torch.equal(trained.model(adv).argmax(1) == labels, seen.right_adv)
    assert ((seen.x_adv - seen.x).abs().max() - 16 / 255).abs() < 1e-6


def test_time_left(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    left = TimeLeft({"attack": 2, "estimates": 3}, models=2, bar=Bar(print))

    def step(name, seconds):
        clock[0] += seconds
        left.step(name, "a.pth")

    step("attack", 10)
    assert left.remaining() == "at least 00:30"
    step("attack", 20)
    step("estimates", 1)
    assert left.remaining() == "00:35"  # 2 x 15 and 5 x 1
    clock[0] += 100
    left.begin()  # loading the next one
    step("estimates", 1)
    assert left.remaining() == "00:34"
