"""Distributed processes: rank and size, and the few collectives that training needs."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimir_fast.config.sections import DistConfig


@dataclass(frozen=True)
class World:
    """The process group as one process sees it.

    rank         0 to size - 1
    local_rank   number on its machine
    host_group   a gloo group, for values in host memory; None in a single process
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    host_group: "dist.ProcessGroup | None" = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Average of a device tensor over all processes."""
        if self.size > 1:
            values = values.clone()
            # A sum and a division: gloo has no average.
            dist.all_reduce(values)
            values /= self.size
        return values

    def total(self, count: int | Tensor) -> int:
        """Sum of a count over all processes, on the host."""
        count = torch.as_tensor(count, dtype=torch.float64, device=self.device)
        return round(float(self.mean(count) * self.size))

    def any(self, flag: bool) -> bool:
        """True on every process if it is true on one."""
        # In host memory, like the next two: a collective of the GPU's would wait for all that is queued there.
        if self.size == 1:
            return flag
        word = torch.tensor(int(flag))
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self.host_group)
        return bool(word)

    def largest(self, number: int) -> int:
        """The largest of the processes' integers."""
        word = torch.tensor(number)
        if self.size > 1:
            dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self.host_group)
        return int(word)

    def same(self, numbers: list[int]) -> bool:
        """Whether every process holds the same integers."""
        if self.size == 1:
            return True
        # One maximum for both ends: the largest -n is minus the smallest n.
        words = torch.tensor([numbers, [-n for n in numbers]])
        dist.all_reduce(words, op=dist.ReduceOp.MAX, group=self.host_group)
        return bool((words[0] == -words[1]).all())

    def agreed(self, text: str) -> str:
        """Rank 0's text, on every process."""
        texts = [text]
        if self.size > 1:
            dist.broadcast_object_list(texts, src=0, group=self.host_group)
        return texts[0]

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Broadcast rank 0's values, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, which have equally many, in the order of ranks: [B,...] -> [size·B,...], no gradient."""
        if self.size == 1:
            return rows
        rows = rows.detach().contiguous()
        whole = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(whole, rows)
        return whole

    def own(self, rows: Tensor) -> Tensor:
        """This process's rows of what `gather` made."""
        return rows.chunk(self.size)[self.rank]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier(group=self.host_group)

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            dist.destroy_process_group()


def find_rank(config: DistConfig, env: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, size, local rank) from the environment, in the original's order: OpenMPI if asked, torchrun, SLURM, one process.

    Raises ValueError if dist_on_itp is given without OpenMPI's variables.
    """
    if config.dist_on_itp:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        if any(name not in env for name in names):
            raise ValueError(f"dist_on_itp: {', '.join(names)} must be set; start with mpirun or leave the flag out")
        rank, size, local_rank = (int(env[name]) for name in names)
        return rank, size, local_rank
    if "RANK" in env and "WORLD_SIZE" in env:
        local_rank = int(env.get("LOCAL_RANK", max(config.local_rank, 0)))
        return int(env["RANK"]), int(env["WORLD_SIZE"]), local_rank
    # SLURM_PROCID alone is also set in a batch script, which is one process; more than one task means srun.
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        rank = int(env["SLURM_PROCID"])
        return (
            rank,
            int(env["SLURM_STEP_NUM_TASKS"]),
            int(env.get("SLURM_LOCALID", rank % max(torch.cuda.device_count(), 1))),
        )
    return 0, 1, 0


def join_world(config: DistConfig, device_name: str) -> World:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and pick this process's device.

    Raises ValueError if the device is CUDA and this process's GPU does not exist.
    """
    rank, size, local_rank = find_rank(config, os.environ)
    device = torch.device(device_name)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", local_rank)
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"device: {device} does not exist, this machine has {torch.cuda.device_count()} CUDA devices"
            )
        torch.cuda.set_device(device)
    if size == 1:
        return World(device=device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    patience = timedelta(minutes=config.dist_timeout)
    dist.init_process_group(backend, config.dist_url, world_size=size, rank=rank, timeout=patience)
    # NCCL moves device memory alone.
    host_group = dist.new_group(backend="gloo", timeout=patience) if backend == "nccl" else dist.group.WORLD
    # Every process is a member of both.
    assert isinstance(host_group, dist.ProcessGroup)
    return World(rank, size, local_rank, device, host_group)


def average_gradients(compress: bool, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """DDP communication hook: the mean of gradients over ranks, summed in fp32, or in bf16 if `compress` is set."""
    # Buckets are in 16 bits where 16-bit copies of the parameters compute: the mean is then rounded once.
    gradients = bucket.buffer()
    words = (gradients.bfloat16() if compress else gradients.float()) / dist.get_world_size()
    return dist.all_reduce(words, async_op=True).get_future().then(lambda sums: gradients.copy_(sums.value()[0]))


def replicated(module: nn.Module, world: World, compress: bool, static: bool) -> DistributedDataParallel:
    """DDP with `average_gradients`; static: the same parameters get gradients in every pass, and none are held back."""
    devices = [world.device] if world.device.type == "cuda" else None
    # Buffers are no gradients' business: those that training changes are averaged at every update (running_statistics.py).
    replica = DistributedDataParallel(
        module, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=static
    )
    replica.register_comm_hook(compress, average_gradients)
    return replica


class GradientBuffer:
    """One fp32 buffer in which the gradients of an update are averaged over processes: for captured steps, in place of DDP,
    whose collectives start inside of the backward pass.

    compress   average in bf16
    """

    def __init__(self, parameters: Iterable[Tensor], world: World, compress: bool):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.size, self.compress = world.size, compress
        counts = [p.numel() for p in self.parameters]
        self.flat = torch.zeros(sum(counts), device=world.device)
        self.parts = [part.view_as(p) for part, p in zip(self.flat.split(counts), self.parameters)]

    @torch.no_grad()
    def gather(self) -> None:
        """Move the parameters' gradients into the buffer.  Work on the device alone."""
        own = [(p, p.grad, part) for p, part in zip(self.parameters, self.parts) if p.grad is not None]
        torch._foreach_copy_([part for *_, part in own], [gradient for _, gradient, _ in own])
        for p, _, part in own:
            # The optimizer reads the averages where they are: nothing is copied back.
            p.grad = part

    def average(self) -> None:
        """Average the buffer over all processes, which all call."""
        words = self.flat.bfloat16() if self.compress else self.flat
        words /= self.size
        dist.all_reduce(words)
        if self.compress:
            self.flat.copy_(words)
