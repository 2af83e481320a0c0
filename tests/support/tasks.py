"""Tasks for tests of the engine: small models, on the CPU, in fp32 and eager unless flags say otherwise; no data, no files."""

from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.pretraining import PretrainConfig
from mimir_fast.config.resolve import resolve
from mimir_fast.models import MaskedAutoencoderViT, VisionTransformer
from mimir_fast.training.distributed import World
from mimir_fast.training.finetune_step import ClassifierAttack
from mimir_fast.training.finetuning import Finetuning
from mimir_fast.training.pretrain_step import MaeAttack
from mimir_fast.training.pretraining import Pretraining

SIZES = {"input_size": 16, "patch_size": 4}  # of the model that the task makes and that is then replaced
ALONE = World()
PLAIN = {"precision": "fp32", "compile": False, "device": "cpu"}


def mae_task(
    model: MaskedAutoencoderViT,
    attack: MaeAttack,
    world: World = ALONE,
    **flags,
) -> Pretraining:
    """Pre-training of this model under this attack."""
    config = PretrainConfig().updated(SIZES | PLAIN | {"attack": "pgd_mae"} | flags)
    task = Pretraining(resolve(config, set()), world)
    task.model, task.attack = model, attack
    return task


def classifier_task(
    model: VisionTransformer,
    attack: ClassifierAttack,
    world: World = ALONE,
    **flags,
) -> Finetuning:
    """Fine-tuning of this model under this attack."""
    own = {"model": "vit_ti", "nb_classes": 2, "attack_train": attack.kind, "smoothing": 0.0}
    task = Finetuning(resolve(FinetuneConfig().updated(SIZES | PLAIN | own | flags), set()), world)
    task.model, task.attack = model, attack
    return task
