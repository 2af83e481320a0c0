"""python -m bench capture: updates launched as a CUDA graph against the same ones uncaptured, parameters bit for bit."""

import argparse

import torch
from torch import Tensor

from bench import records, steps
from mimir_fast.training.distributed import World
from mimir_fast.training.running import seed_everything

EPILOG = """Other flags are pre-training's.  Uncaptured updates run twice, to tell what is not repeatable from a wrong capture.
Exit status: 0 the same, 1 different, 2 not captured at all."""


def build_parser() -> argparse.ArgumentParser:
    parser = records.parser("capture", __doc__, EPILOG)
    parser.add_argument("--updates", type=int, default=10, help="of each kind (default: %(default)s)")
    return parser


def run(args: argparse.Namespace, flags: list[str]) -> int:
    """Run and compare; returns the exit status.  Raises ValueError if the step is not captured."""
    steps.leave_cudnn_out()
    uncaptured, again, captured = (trained(args.updates, how, flags) for how in ("off", "off", "auto"))
    if wrong := differing(uncaptured, again):
        print(f"not repeatable without a capture, which this says nothing about: {wrong}")
        return 1
    wrong = differing(uncaptured, captured)
    print(
        f"{args.updates} captured and {args.updates} uncaptured updates: {wrong or 'the same parameters, bit for bit'}"
    )
    return int(bool(wrong))


def trained(updates: int, step_graph: str, flags: list[str]) -> dict[str, Tensor]:
    """The model's parameters after so many updates, each on images and at a rate of its own."""
    asked = steps.asked(steps.PRETRAIN, ["--device", "cuda", *flags, "--step_graph", step_graph])
    world, sizes = World(device=torch.device(asked.device)), asked.config.flat()
    seed_everything(sizes["seed"])
    engine = steps.tuned_engine(asked, world)
    generator = torch.Generator(world.device).manual_seed(1)
    shape = (sizes["batch_size"], 3, sizes["input_size"], sizes["input_size"])
    labels = torch.zeros(shape[0], dtype=torch.int64, device=world.device)
    accum = engine.accum_iter
    with engine.captured.context():
        for step in range(updates * accum):
            images = torch.randint(256, shape, dtype=torch.uint8, device=world.device, generator=generator)
            number, last = step // accum + 1, (step + 1) % accum == 0
            engine.updater.set_learning_rate(1e-3 / number)  # another one for every update
            engine.advance(images, labels, 0, step, number if last else None, first=step % accum == 0)
            steps.make_room(engine, number)
    if step_graph == "auto" and engine.captured.reason:
        raise ValueError(f"step_graph: the step is not captured: {engine.captured.reason}")
    return {name: parameter.detach().cpu() for name, parameter in engine.task.model.named_parameters()}


def differing(these: dict[str, Tensor], those: dict[str, Tensor]) -> str:
    """Which parameters differ, and by how much at worst; "" if none does.  NaN differs from everything."""
    found = {
        name: (these[name] - those[name]).abs().max().item() for name in these if not these[name].equal(those[name])
    }
    worst = ", ".join(f"{name} by {size:.3g}" for name, size in list(found.items())[:3])
    return f"{len(found)} of {len(these)} parameters differ: {worst}" if found else ""
