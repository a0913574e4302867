"""One object by several processes, each with a GPU of its own: `torchrun` starts them.

Every process holds the whole scene and draws the same random numbers. Of each step's views it renders some, asks the
guidance about those, and the gradients of all are summed. What follows is the same everywhere, so parameters,
optimiser, occupancy grid and generator stay equal to the bit, and nothing but gradients is ever sent.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from dreamfusion_fast.errors import UserError, one_line
from dreamfusion_fast.training.device import resolve_device

# Steps after which a wish to stop is read on a GPU: the host is as far ahead, and waits for nothing that it would not
# wait for anyway.
_AHEAD = 2


def started_by_torchrun() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined_ranks(device: str) -> Iterator[Ranks]:
    """Join the other processes that torchrun has started, until the block ends.

    Args:
        device: auto or cuda: the GPU of this process's LOCAL_RANK, auto on a machine without GPUs the CPU; or cpu.

    Raises:
        UserError: another device, fewer GPUs than processes on this machine, or the others cannot be reached.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise UserError(f"--device: got {device}, want auto, cuda or cpu: torchrun gives each process a GPU of its own")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    where = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu")
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # NCCL would sum up by NVLink's multicast, which not every host allows
    if on_gpu:
        torch.cuda.set_device(where)
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    except Exception as error:  # of many kinds
        raise UserError(f"cannot reach the other processes of torchrun: {one_line(error)}") from error
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), where)
    yield ranks
    ranks.leave()  # not after an error: it could wait for processes that wait for this one, and torchrun ends them all


class Ranks:
    """The processes that share the views of a step, and which of them this one is.

    Args:
        rank: of this one, from 0. Rank 0 alone writes files.
        count: of all.
        device: of this process.
    """

    def __init__(self, rank: int, count: int, device: torch.device) -> None:
        self.rank, self.count, self.device = rank, count, device
        self._sent: Tensor | None = None
        self._wishes: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.stop_wanted = False
        """Set where a signal has asked this process to stop."""

    def views(self, batch: int) -> slice:
        """The views of a batch that this process renders.

        Raises:
            UserError: there is not one for each process.
        """
        if batch < self.count:
            raise UserError(f"--batch: got {batch} views per step for {self.count} processes, want one each at least")
        return slice(batch * self.rank // self.count, batch * (self.rank + 1) // self.count)

    def leave(self) -> None:
        """Part from the other processes, which do the same now. May be called more than once."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def check_same(self, values: Sequence[int], what: str) -> None:
        """Raise UserError where `values` of another process are others; waits for all."""
        mine = torch.tensor(values, dtype=torch.int64, device=self.device)
        all_of_them = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(all_of_them, mine)
        if any(not torch.equal(mine, theirs) for theirs in all_of_them):
            shown = "; ".join(str(theirs.tolist()) for theirs in all_of_them)
            raise UserError(f"the processes of torchrun differ in {what} ({shown}); give all of them the same command")

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Make tensors of the same shapes everywhere what they are in rank 0, in place."""
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)

    def sum(self, gradients: Sequence[Tensor], numbers: Sequence[Tensor]) -> list[Tensor]:
        """Add up what all processes have. Once per step, since it also carries the wish to stop.

        Args:
            gradients: the same shapes everywhere; each becomes the sum, in place.
            numbers: 0-dim.

        Returns:
            The sums of `numbers`.
        """
        wish = torch.full((), float(self.stop_wanted), device=self.device)
        scalars = torch.stack([*(number.detach().to(torch.float32) for number in numbers), wish])
        sizes = [gradient.numel() for gradient in gradients]
        if self._sent is None or self._sent.numel() != sum(sizes) + len(scalars):
            self._sent = torch.empty(sum(sizes) + len(scalars), device=self.device)
        *parts, last = self._sent.split([*sizes, len(scalars)])
        views = [part.view(gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]
        torch._foreach_copy_([*views, last], [*gradients, scalars])
        dist.all_reduce(self._sent)
        torch._foreach_copy_(list(gradients), views)
        sums = last.clone()
        self._note(sums[-1])
        return list(sums[:-1].unbind())

    def _note(self, wish: Tensor) -> None:
        if not wish.is_cuda:
            self._wishes.append((wish, None))
            return
        host = torch.empty((), pin_memory=True).copy_(wish, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(wish.device))
        self._wishes.append((host, event))

    def stop(self) -> bool:
        """Whether all processes are to stop before the next step: the answer is the same in all of them."""
        found = False
        while len(self._wishes) > (0 if self.device.type == "cpu" else _AHEAD):
            wish, event = self._wishes.popleft()
            if event is not None:
                event.synchronize()
            found = found or float(wish) > 0
        return found
