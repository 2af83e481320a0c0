"""A classifier's start: what it takes from a checkpoint, what it says, and what it refuses."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.transfer import load_pretrained
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.models import VisionTransformer, create_classifier
from mimir_fast.models.families.vit import resize_positions
from mimir_fast.training.pretrained_start import start_from_pretrained
from tests.golden.test_classifier import SIZES
from tests.support.golden import load_golden, small_model

TINY = {"img_size": 16, "patch_size": 4, "num_classes": 10}


def classifier(**options) -> VisionTransformer:
    return VisionTransformer(**(SIZES | options))


def load(model: VisionTransformer, state: dict, head_std: float = 0.02) -> list[str]:
    said = []
    load_pretrained(model, state.get("model", state), "x.pth", said.append, head_std)
    return said


def test_takes_the_encoder_and_says_so():
    model, encoder = classifier(), small_model().state_dict()
    said = load(model, {"model": encoder, "epoch": 3})
    assert all(torch.equal(model.state_dict()[key], encoder[key]) for key in encoder if key.startswith("blocks."))
    assert said[0] == "finetune: x.pth: 28 of 32 tensors loaded"
    assert "blocks.* (24)" in said[1]
    assert "fc_norm.* (2), head.* (2) (start afresh)" in said[2]
    assert "decoder_* (19), norm.* (2) (not used)" in said[3]
    assert len(said) == 4


def test_every_kind_of_file_and_the_running_average_first(tmp_path):
    trained, average = classifier().state_dict(), classifier().state_dict()
    average["cls_token"] = trained["cls_token"] + 1
    torch.save({"model": trained, "model_ema": average}, tmp_path / "both.pth")
    torch.save(trained, tmp_path / "bare.pth")
    save_file(trained, tmp_path / "exported.safetensors")
    for name, expected in {"both.pth": average, "bare.pth": trained, "exported.safetensors": trained}.items():
        model, said = classifier(), []
        config = FinetuneConfig().updated({"finetune": str(tmp_path / name)})
        start_from_pretrained(model, config, said.append)
        assert torch.equal(model.cls_token, expected["cls_token"])
        taken = f"{name} (model_ema)" if expected is average else name
        assert said[0] == f"finetune: {tmp_path / taken}: 30 of 32 tensors loaded"


def test_the_head_starts_afresh_whatever_the_checkpoint_has():
    torch.manual_seed(1)
    model, other = classifier(num_classes=400), classifier(num_classes=400)
    with torch.no_grad():
        model.head.bias.fill_(1.0)
        other.head.bias.fill_(2.0)
    said = load(model, other.state_dict(), head_std=2e-5)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert model.head.weight.abs().max() > 0
    assert (model.head.bias == 0).all()
    assert torch.equal(model.fc_norm.weight, other.fc_norm.weight)
    assert "head.* (2) (start afresh)" in said[2]
    assert "head.* (2) (not used)" in said[3]
    load(model, classifier(num_classes=3).state_dict())  # another number of classes is no obstacle


def test_the_class_token_head_takes_the_final_norm():
    model, encoder = classifier(global_pool=False), small_model().state_dict()
    load(model, {"model": encoder})
    assert torch.equal(model.norm.weight, encoder["norm.weight"])


def test_positions_of_another_grid():
    model, encoder = classifier(img_size=24), small_model().state_dict()
    said = load(model, {"model": encoder})
    assert said[-1] == "  positional table resized from 8 x 8 to 6 x 6 patches"
    assert torch.equal(model.pos_embed, resize_positions(encoder["pos_embed"], 6))
    assert torch.equal(model.pos_embed[:, 0], encoder["pos_embed"][:, 0])
    assert model.pos_embed.requires_grad
    ramp = torch.arange(8.0).repeat(8).view(1, 64, 1).expand(1, 64, 2)  # columns stay columns
    table = resize_positions(torch.cat([torch.zeros(1, 1, 2), ramp], dim=1), 4)
    assert torch.allclose(table[0, 1:, 0].view(4, 4)[0], table[0, 1:, 0].view(4, 4)[3], atol=1e-5)
    assert (table[0, 1:, 0].view(4, 4).diff(dim=1) > 1).all()


def test_a_16_bit_checkpoint():
    model, encoder = classifier(), small_model().state_dict()
    load(model, {"model": {key: value.bfloat16() for key, value in encoder.items()}})
    assert model.cls_token.dtype == torch.float32
    assert torch.equal(model.cls_token, encoder["cls_token"].bfloat16().float())


def test_the_wrong_architecture_is_named():
    with torch.device("meta"):
        small, tiny = (create_classifier(name, **TINY) for name in ("vit_small", "vit_ti"))
    with pytest.raises(
        CheckpointError, match=r"x.pth holds vit_small \(width 384, depth 12, MLP width 1536\), --model is vit_ti \("
    ):
        load(tiny, small.state_dict())
    with pytest.raises(CheckpointError, match=r"holds vit_ti .*--model is a ViT of width 192, depth 2, MLP width 768"):
        load(VisionTransformer(**TINY, embed_dim=192, depth=2, num_heads=3), tiny.state_dict())
    with pytest.raises(CheckpointError, match=r"patches of side 4, --patch_size is 8"):
        load(classifier(patch_size=8), small_model().state_dict())


def test_what_is_no_encoder_is_refused():
    encoder = small_model().state_dict()
    swin = {f"encoder.{key}": value for key, value in encoder.items()}
    with pytest.raises(CheckpointError, match=r"x.pth shares no parameter with the model .*encoder"):
        load(classifier(), {"model": swin})
    with pytest.raises(CheckpointError, match="shares no parameter"):
        load(classifier(), {"model": {}})
    partly = {key: value for key, value in encoder.items() if not key.endswith("qkv.bias")}
    with pytest.raises(CheckpointError, match=r"no whole ViT encoder: 2 missing parameters.*blocks.0.attn.qkv.bias"):
        load(classifier(), partly)
    convolutional = {key: value for key, value in encoder.items() if key != "cls_token"}
    with pytest.raises(CheckpointError, match=r"no whole ViT encoder: 1 missing parameter .*cls_token"):
        load(classifier(), convolutional)
    with pytest.raises(CheckpointError, match=r"positional table .*\(1, 64, 48\).*square grid"):
        load(classifier(), encoder | {"pos_embed": encoder["pos_embed"][:, 1:]})
    with pytest.raises(CheckpointError, match=r"blocks.0.norm1.bias of shape \(47,\)"):
        load(classifier(), encoder | {"blocks.0.norm1.bias": torch.zeros(47)})


def test_a_refused_checkpoint_changes_nothing():
    model, encoder = classifier(), load_golden("mae_state")[0]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        load(model, encoder | {"blocks.1.norm1.bias": torch.zeros(47)})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("before", [True, False, None])
@pytest.mark.parametrize("now", [True, False])
def test_asks_about_other_normalisation(tmp_path, before, now):
    state = {"model": small_model().state_dict()}
    if before is not None:
        state["args"] = argparse.Namespace(use_normalize=before)
    torch.save(state, tmp_path / "x.pth")
    said = []
    config = FinetuneConfig().updated({"finetune": str(tmp_path / "x.pth"), "use_normalize": now})
    start_from_pretrained(classifier(), config, said.append)
    assert any(line.startswith("use_normalize:") for line in said) == (before is not None and before != now)
