"""One case: every contender is checked, the right ones are timed; one record per contender and direction."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.harness import Clock, Contender, sets_for, timed
from bench.kernels.case import Case, Inputs, leaves, outputs
from bench.kernels.check import Judge, upstream_like, values
from bench.kernels.short import SHORT, kernel_ms
from bench.kernels.work import Work, work

DIRECTIONS = ("forward", "backward", "both")
IMPLS = ("ours", "eager", "compiled", "others")


@dataclass(frozen=True)
class Setting:
    """Where and how.

    seconds   of timing per direction; cache [bytes]; reached: measured peaks
    pretend   nothing is computed or timed
    proton    times the kernels alone too, where a call is short
    """

    device: torch.device
    clock: Clock
    reached: dict[str, float | None]
    cache: int
    seconds: float = 1.0
    impls: tuple[str, ...] = IMPLS
    directions: tuple[str, ...] = DIRECTIONS
    pretend: bool = False
    proton: bool = False


@dataclass
class Prepared:
    """A case's sets of inputs with their upstream gradients, and its contenders; trouble: what is not to be timed, and why."""

    case: Case
    sets: list[tuple[Inputs, list[Tensor]]]
    contenders: dict[str, Callable]
    work: dict[str, Work]
    trouble: dict[str, tuple[str, str]] = field(default_factory=dict)  # contender -> status, why


def records(case: Case, setting: Setting) -> Iterator[dict]:
    """A record per contender and direction, as soon as it is there.  What raises is a record too: status "failed"."""
    with fresh_compiler():
        try:
            prepared = prepare(case, setting)
        except Exception as error:
            yield record(case, "all", "all", "failed", why=short(error))
            return
        differentiable = bool(leaves(prepared.sets[0][0]))
        for direction in setting.directions:
            if direction == "forward" or differentiable:
                yield from _direction(prepared, direction, setting)


def prepare(case: Case, setting: Setting) -> Prepared:
    """Draw the inputs, and check every contender once; on a pretend GPU run it once, forward and backward."""
    torch.manual_seed(0)
    known = work(case)
    inputs = case.draw(setting.device)
    upstream = upstream_like(outputs(case.reference(**inputs)))
    moved = known["forward"].bytes if known else _bytes(inputs)
    count = 1 if setting.pretend else sets_for(moved, setting.cache)
    more = (case.draw(setting.device) for _ in range(count - 1))
    sets = [(inputs, upstream), *((new, [_again(g) for g in upstream]) for new in more)]
    prepared = Prepared(case, sets, contenders(case, setting), known)
    _check(prepared, setting)
    return prepared


def contenders(case: Case, setting: Setting) -> dict[str, Callable]:
    """The implementations asked for that exist: ours runs on GPUs only."""
    found: dict[str, Callable] = {}
    if "ours" in setting.impls and setting.device.type == "cuda":
        found["ours"] = case.ours
    if "eager" in setting.impls:
        found["eager"] = case.reference
    if "compiled" in setting.impls:
        found["compiled"] = torch.compile(case.reference, dynamic=False)
    return found | (case.rivals if "others" in setting.impls else {})


def _check(prepared: Prepared, setting: Setting) -> None:
    """Notes what is refused, raises or is wrong."""
    case, (inputs, upstream) = prepared.case, prepared.sets[0]
    judge = None if setting.pretend else Judge(case, inputs, upstream)
    for name, function in prepared.contenders.items():
        if name == "ours" and case.refused:
            prepared.trouble[name] = ("refused", case.refused)
            continue
        try:
            wrong = judge.wrong(name, function) if judge else values(function, inputs, upstream) and ""
        except Exception as error:
            prepared.trouble[name] = ("failed", short(error))
            continue
        if wrong:
            prepared.trouble[name] = ("wrong", wrong)


def _direction(prepared: Prepared, direction: str, setting: Setting) -> Iterator[dict]:
    """Records of one direction; a contender that raises here only is one of trouble too."""
    case, sets = prepared.case, prepared.sets
    ready: dict[str, Contender] = {}
    for name, function in prepared.contenders.items():
        status, why = prepared.trouble.get(name, ("", ""))
        if not status:
            try:
                ready[name] = contender(function, sets, direction)
                ready[name](0)
            except Exception as error:
                ready.pop(name, None)
                status, why = "failed", short(error)
        if status:
            yield record(case, direction, name, status, why=why)
    if setting.pretend:
        yield from (record(case, direction, name, "pretend", prepared.work.get(direction)) for name in ready)
        return
    try:
        times = timed(ready, len(sets), setting.seconds, setting.clock) if ready else {}
    except Exception as error:
        yield from (record(case, direction, name, "failed", why=short(error)) for name in ready)
        return
    for name, found in times.items():
        if setting.proton and found["ms"] < SHORT:
            found = {**found, **_alone(ready[name], len(sets))}
        yield record(case, direction, name, "ok", prepared.work.get(direction), {"sets": len(sets), **found}, setting)


def _alone(run: Contender, sets: int) -> dict:
    """Proton's time; where it fails the reason is on record, the call's own time stays."""
    try:
        return {"kernel ms": kernel_ms(run, sets)}
    except Exception as error:
        return {"why": f"proton: {short(error)}"}


def contender(function: Callable, sets: list[tuple[Inputs, list[Tensor]]], direction: str) -> Contender:
    """What is timed.  backward starts from outputs kept of every set; without a leaf there is no graph."""

    def backward(results: tuple[Tensor, ...], number: int, keep: bool) -> tuple[Tensor, ...]:
        inputs, upstream = sets[number]
        return torch.autograd.grad(results, list(leaves(inputs).values()), upstream, retain_graph=keep)

    if direction == "forward":
        return lambda number: function(**sets[number][0])
    if direction == "both":
        return lambda number: backward(outputs(function(**sets[number][0])), number, keep=False)
    kept = [outputs(function(**inputs)) for inputs, _ in sets]
    return lambda number: backward(kept[number], number, keep=True)


@contextlib.contextmanager
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled for another case counts against this one; buffers of kept graphs are not given away."""
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield


def short(error: Exception, length: int = 200) -> str:
    """One line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= length else text[: length - 3] + "..."


def record(
    case: Case,
    direction: str,
    impl: str,
    status: str,
    work: Work | None = None,
    times: dict | None = None,
    setting: Setting | None = None,
    why: str = "",
) -> dict:
    """Times in ms; GB and TFLOP by contract; rates and the share of the measured peak where there is a time."""
    row = {
        "op": case.op,
        "config": case.shape,
        "dtype": case.dtype,
        "direction": direction,
        "impl": impl,
        "status": status,
        "why": why,
        **dict.fromkeys(("ms", "ms_p20", "ms_p80", "rounds", "sets", "kernel ms")),
        "GB": work and work.bytes / 1e9,
        "TFLOP": work and sum(work.flops.values()) / 1e12,
        **dict.fromkeys(("GB/s", "TFLOP/s", "bound ms", "share of peak")),
    }
    if times:
        row |= times
    if times and work:
        bound = work.bound_ms(setting.reached)
        row["GB/s"], row["TFLOP/s"] = (row[unit] / times["ms"] * 1e3 for unit in ("GB", "TFLOP"))
        row["bound ms"], row["share of peak"] = bound, bound and bound / times["ms"]
    return row


def _again(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else torch.randn_like(gradient)


def _bytes(inputs: Inputs) -> int:
    return sum(t.nbytes for t in inputs.values() if isinstance(t, Tensor))
