"""`mimir-fast finetune --eval --resume CKPT`: the original's evaluation, by mimir_fast.evaluate."""

from mimir_fast.checkpoints.fetch import beside
from mimir_fast.checkpoints.trained_models import OVERRIDES, load_classifier
from mimir_fast.config.finetuning import FinetuneConfig
from mimir_fast.config.resolve import Run
from mimir_fast.evaluate.autoattack import refusal
from mimir_fast.evaluate.evaluation import original_sequence, run_evaluation
from mimir_fast.evaluate.images import Images
from mimir_fast.evaluate.rounds import Sizes
from mimir_fast.evaluate.team import ALONE, Team


def evaluate(run: Run[FinetuneConfig], team: Team = ALONE) -> int:
    """Clean accuracy, PGD-5 at eps 1, PGD-20, PGD-100 and AutoAttack, or with --adap_eval the adaptive attacks; in fp32.

    team   the processes that share the images, all of which call
    Model and data set are the checkpoint's unless flags name others; eps and alpha are the flags', as in the original.
    Results are written beside the checkpoint.  Returns 0; raises ValueError for wrong input.
    """
    config, source = run.config, run.config.run.resume
    flat = config.flat()
    overrides = {name: flat[name] for name in OVERRIDES if name in run.explicit and name in flat}
    device = run.device if team.world.size == 1 else str(team.world.device)
    with team.first():
        trained = load_classifier(source, overrides=overrides, device=device)
    dataset = flat["dataset"] if "dataset" in run.explicit else trained.args.get("dataset") or flat["dataset"]
    a, d = config.attack, config.data
    cut = ", images as they are" if config.validation.eval_resize == "none" else ""
    radius = f"eps {a.eps:g}/255, alpha {a.alpha:g}/255"
    team.say(*trained.notes, f"{trained.source}: {trained.args['model']}, {radius}, on {device}{team.words()}{cut}")
    attacks = original_sequence(a.eps, a.alpha, config.validation.adap_eval)
    # One attack that cannot run is no reason to leave out the others.
    if any(attack.kind == "aa" for attack in attacks) and (reason := refusal(trained.args["nb_classes"])):
        team.say(f"eval: AutoAttack is left out, it {reason}")
        attacks = tuple(attack for attack in attacks if attack.kind != "aa")
    images = Images(
        dataset,
        d.data_root,
        trained.args["input_size"],
        num_workers=d.num_workers,
        eval_resize=config.validation.eval_resize,
    )
    batch = config.optim.batch_size
    run_evaluation(
        trained.model,
        trained.source,
        images,
        attacks,
        beside(source, "eval"),
        sizes=Sizes(batch, batch),
        seed=config.run.seed,
        classes=trained.classes,
        team=team,
        launch=run.compute.step_graph,
    )
    return 0
