"""Description of a run: the lines printed before it begins."""

from mimir_fast.config.resolve import Compute
from mimir_fast.config.sections import OptimConfig
from mimir_fast.data import BatchStream
from mimir_fast.training.distributed import World
from mimir_fast.training.optimizer import scheduled_rate
from mimir_fast.training.options import patch_size
from mimir_fast.training.task import Task


def describe(task: Task, stream: BatchStream, world: World, lr: float, uncaptured: str) -> list[str]:
    """Lines: model, data, attack; device, arithmetic, outputs; the cache; what does not do as its flags say.

    uncaptured   why the step is no CUDA graph, if so
    """
    config, compute = task.run.config, task.run.compute
    parameters = sum(p.numel() for p in task.model.parameters()) / 1e6
    parallel = f"{compute.words()['parallel']}, " if world.size > 1 else ""
    launched = f"step uncaptured ({uncaptured}), " if uncaptured else "step one CUDA graph, "
    launched = parallel + launched * (world.device.type == "cuda")
    return [
        f"model {config.model.model} ({parameters:.2f} M parameters), {config.model.input_size}/{patch_size(task.run)}; "
        f"data {stream.name}, {stream.num_images} images, {len(stream)} micro-batches per epoch; {task.summary}",
        f"device {world.device} x {world.size}, {launched}{arithmetic(compute)}; "
        f"lr {lr:.3g}; outputs in {config.run.output_dir or '(nowhere)'}",
        *([f"data {stream.origin}"] if stream.origin else []),
        *([f"tune: computes with {compute.tune}"] if compute.measured else []),
        *schedule_notes(config.optim, len(stream), lr),
    ]


def schedule_notes(o: OptimConfig, steps: int, lr: float) -> list[str]:
    """Lines about a schedule that does not do what its flags say, in epochs of `steps` micro-steps with peak rate lr."""
    lines, rest = [], steps % o.accum_iter
    if rest:
        lines.append(f"accum_iter: the last {rest} of an epoch's {steps} micro-batches make no update and are dropped")
    # The epoch, a fraction, at which the last update begins.
    last = o.epochs - (o.accum_iter + rest) / steps
    if last < o.warmup_epochs:
        highest = scheduled_rate(last, lr, o)
        lines.append(
            f"warmup_epochs: {o.warmup_epochs} of {o.epochs} epochs: the learning rate rises to {highest:.3g}, not to {lr:.3g}"
        )
    if o.min_lr > lr:
        lines.append(f"min_lr: {o.min_lr:g} is above the peak {lr:.3g}: the learning rate rises to the end")
    return lines


def arithmetic(compute: Compute) -> str:
    """How a step computes."""
    words = compute.words()
    compiled = f"{compute.compile_mode}, by {compute.compile_region}" if compute.compile else "off"
    return (
        f"{words['precision']}, compile {compiled}, kernels {compute.kernels}, attention {words['attention']}, "
        f"mlp {words['mlp']}, residual {words['residual_dtype']}"
    )
