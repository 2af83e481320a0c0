"""The lines that say what is about to run."""

from mimir_fast.config.stages import ComputeConfig
from mimir_fast.training.distributed import World
from mimir_fast.training.task import Task


def describe(task: Task, world: World, lr: float) -> list[str]:
    """Model, data and attack; device, arithmetic and outputs."""
    config, stream = task.config, task.stream
    parameters = sum(p.numel() for p in task.model.parameters()) / 1e6
    parallel = f"{config.compute.parallel}, " if world.size > 1 else ""
    return [
        f"model {config.model.model} ({parameters:.2f} M parameters), {config.model.input_size}/{config.model.patch_size}; "
        f"data {stream.name}, {stream.num_images} images, {len(stream)} micro-batches per epoch; {task.summary}",
        f"device {world.device} x {world.size}, {parallel}{arithmetic(config.compute)}; "
        f"lr {lr:.3g}; outputs in {config.run.output_dir or '(nowhere)'}",
    ]


def arithmetic(c: ComputeConfig) -> str:
    """How a step computes."""
    compiled = f"{c.compile_mode}, by {c.compile_region}" if c.compile else "off"
    return (
        f"{c.precision}, compile {compiled}, kernels {c.kernels}, attention {c.attention}, mlp {c.mlp}, "
        f"residual {c.residual_dtype}"
    )
