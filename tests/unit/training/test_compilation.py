"""The compiled step: same numbers, nothing compiled again, a clock; eager where there is no compiler; batches ahead of time."""

import pytest
import torch
import torch._inductor.config

from mimir_fast.data import prefetch
from mimir_fast.models import MaskedAutoencoderViT
from mimir_fast.training.compilation import ON_CPU, CompileClock, Compiler, mode_inside
from mimir_fast.training.distributed import World
from mimir_fast.training.engine import Engine
from mimir_fast.training.pretrain_step import MaeAttack, draw_noise
from tests.support.golden import BOUNDS, SMALL, golden_images, small_model
from tests.support.tasks import mae_task


@pytest.mark.slow
@pytest.mark.parametrize("region", ["model", "block"])
def test_compiled_step_is_the_eager_step_and_compiles_once(region):
    torch._dynamo.reset()
    noise = draw_noise(torch.Generator().manual_seed(1), 8, 64, MaeAttack(1, BOUNDS))
    losses, grads, clock = [], [], CompileClock()
    for compile in (False, True):
        model = small_model()
        flags = {"compile": compile, "compile_region": region, "mi_train": "hsic", "mi_xpl": 1e-3}
        engine = Engine(mae_task(model, MaeAttack(1, BOUNDS), **flags), World(), backend="aot_eager")
        clock.start()
        for i in range(2 + compile):
            model.zero_grad()
            loss = engine.forward_backward(golden_images()[i], noise).loss
            if i == 1:
                losses.append(loss.item())
                grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
                count = clock.count
        clock.stop()
        assert clock.count == count  # the third step compiles nothing
        assert (clock.count > 0) == compile
    assert clock.seconds > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    largest = max(g.abs().max() for g in grads[0].values())
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).abs().max() < 1e-4 * largest, name


@pytest.mark.slow
def test_deep_decoders_compile_by_block(monkeypatch):
    """First and other blocks of either width and the decoder's last, in training and in the attack: ten, past torch's limit."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, mode, backend, **options: compile(self, **options, backend=count)
    )
    with torch._dynamo.config.patch(recompile_limit=8):
        _train_by_block(MaskedAutoencoderViT(**(SMALL | {"depth": 3, "decoder_depth": 3})))
    assert len(graphs) == 10


def _train_by_block(model: MaskedAutoencoderViT) -> None:
    engine = Engine(mae_task(model, MaeAttack(1, BOUNDS), compile=True, compile_region="block"), World())
    noise = draw_noise(torch.Generator().manual_seed(1), 8, 64, MaeAttack(1, BOUNDS))
    for _ in range(2):
        engine.forward_backward(golden_images()[0], noise)


def test_prefetch_passes_every_batch_in_order():
    batches = [(torch.full((2, 3, 4, 4), i, dtype=torch.uint8), torch.full((2,), 10 + i)) for i in range(3)]
    arrived = [(int(images[0, 0, 0, 0]), int(labels[1])) for images, labels in prefetch(batches, torch.device("cpu"))]
    assert arrived == [(0, 10), (1, 11), (2, 12)]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_have_no_graphs_inside_of_a_captured_step_and_do_not_accumulate_outside(mode):
    without = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}[mode]
    assert [mode_inside(mode, "", count) for count in (1, 4)] == [without, without]
    assert mode_inside(mode, "--step_graph off", 1) == mode_inside(mode, ON_CPU, 4) == mode
    assert mode_inside(without, "--step_graph off", 4) == without
    with pytest.raises(ValueError, match=f"compile_mode: {mode} .* --accum_iter 4.*pass --compile_mode {without}"):
        mode_inside(mode, "--step_graph off", 4)


def test_checks_of_results_are_left_out_where_kernels_are_ours_alone(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda _, **how: how)
    asked = {"fullgraph": True, "dynamic": False, "backend": "inductor"}
    mode = "max-autotune-no-cudagraphs"
    assert Compiler(mode=mode, reference=True).trained(len) == asked | {"mode": mode}
    own = {"size_asserts": False, "alignment_asserts": False, "max_autotune": True, "coordinate_descent_tuning": True}
    assert Compiler(mode=mode, reference=False).trained(len) == asked | {"options": own}
