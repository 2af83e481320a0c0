"""The training loop on a GPU: it never waits for the device between two log lines, its stages named or not."""

from contextlib import nullcontext

import pytest
import torch

from mimir_fast.cli import pretrain
from mimir_fast.training.logs import RunLog
from mimir_fast.training.stages import listening
from tests.support.runs import make_images

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@needs_gpu
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("extra", ["--no_compile", "--compile"])
def test_five_steps_without_a_host_synchronisation(tmp_path, monkeypatch, extra, named):
    from mimir_fast.training.engine import Engine

    data, steps = make_images(tmp_path / "data"), []
    advance, flush = Engine.advance, RunLog.flush

    def counted(self, *args):
        steps.append(1)
        torch.cuda.set_sync_debug_mode(
            "error" if len(steps) > 2 else "default"
        )  # after compilation, until the next flush
        return advance(self, *args)

    def reading(self, **options):
        torch.cuda.set_sync_debug_mode("default")
        return flush(self, **options)

    monkeypatch.setattr(Engine, "advance", counted)
    monkeypatch.setattr(RunLog, "flush", reading)
    words = f"""--dataset imagefolder --data_root {data} --model mae_vit_ti --input_size 32 --patch_size 4 --norm_pix_loss
        --batch_size 2 --num_workers 0 --attack pgd_mae --mi_train hsic --max_steps 7 --epochs 9 --warmup_epochs 1
        --log_every 100 --output_dir {tmp_path / "out"} --log_dir {tmp_path / "out"} --tune off {extra}"""
    opened = []

    def ranged(name: str):
        opened.append(name)
        return torch.profiler.record_function(name)

    with listening(ranged) if named else nullcontext():
        assert pretrain.main(words.split()) == 0
    assert len(steps) == 7
    assert opened.count("optimizer") == 7 * named
