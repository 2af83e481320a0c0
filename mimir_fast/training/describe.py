"""Description of a run: the lines printed before it begins."""

from mimir_fast.config.resolve import Compute
from mimir_fast.data import BatchStream
from mimir_fast.training.distributed import World
from mimir_fast.training.task import Task


def describe(task: Task, stream: BatchStream, world: World, lr: float, uncaptured: str) -> list[str]:
    """Lines: model, data, attack; device, arithmetic, outputs; the cache.  uncaptured: why the step is no CUDA graph, if so."""
    config = task.run.config
    parameters = sum(p.numel() for p in task.model.parameters()) / 1e6
    parallel = f"{task.run.compute.words()['parallel']}, " if world.size > 1 else ""
    launched = f"step uncaptured ({uncaptured}), " if uncaptured else "step one CUDA graph, "
    launched = parallel + launched * (world.device.type == "cuda")
    return [
        f"model {config.model.model} ({parameters:.2f} M parameters), {config.model.input_size}/{config.model.patch_size}; "
        f"data {stream.name}, {stream.num_images} images, {len(stream)} micro-batches per epoch; {task.summary}",
        f"device {world.device} x {world.size}, {launched}{arithmetic(task.run.compute)}; "
        f"lr {lr:.3g}; outputs in {config.run.output_dir or '(nowhere)'}",
        *([f"data {stream.origin}"] if stream.origin else []),
    ]


def arithmetic(compute: Compute) -> str:
    """How a step computes."""
    words = compute.words()
    compiled = f"{compute.compile_mode}, by {compute.compile_region}" if compute.compile else "off"
    return (
        f"{words['precision']}, compile {compiled}, kernels {compute.kernels}, attention {compute.attention}, "
        f"mlp {compute.mlp}, residual {words['residual_dtype']}"
    )
