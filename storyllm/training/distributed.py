"""Several processes that train one model, started by torchrun.

Every process has all the weights. The windows of an update are divided among the processes, their gradients are added
up, and every process takes the same step. Rank 0 writes the files.

DistributedDataParallel needs as many backward passes on every process, and cannot repeat an update for which one of
them ran out of memory. So gradients are added up here, in buckets during the last backward pass as it does (Li et al.
2020), and after each update the processes exchange whether all of them computed their share.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import StoryLLMError
from ..device import is_out_of_memory
from .interrupt import StopRequested

TIMEOUT = "STORYLLM_TIMEOUT"  # environment variable: how long a process waits for the others, in seconds
DEFAULT_TIMEOUT = 300.0
REPORT_SECONDS = 5.0  # within which a process that still runs notices that another one does not
BUCKET_BYTES = 25 << 20  # gradients that are added up at once
OUT_OF_MEMORY = -1  # the status of a process that ran out of memory; that of an interrupted one is the signal

T = TypeVar("T")


class ConnectionLostError(Exception):
    """Another process does not answer."""


class StoppedElsewhere(StopRequested):
    """Another process was interrupted. The argument is the signal."""


class OutOfMemoryElsewhereError(MemoryError):
    """Another process ran out of memory. The argument is its name."""


class Processes:
    """The processes of a run; this one has the number `rank`. They are connected within the `with` block.

    An error on one process ends the run on all of them: it is raised there, and SystemExit on the others. If a process
    was killed or does not answer, one of the others raises a StoryLLMError that names it.
    """

    def __init__(self, rank: int = 0, size: int = 1, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.rank = rank
        self.size = size
        self.timeout = timeout  # in seconds
        self.hosts = [socket.gethostname()] * size  # of each process
        self._store: Any = None  # shared, and available even if a process has failed
        self._stdout = sys.stdout
        self._gradients: GradientSum | None = None
        self._summed = False  # in the current attempt

    def __enter__(self) -> Processes:
        if self.size == 1:
            return self
        timeout = datetime.timedelta(seconds=self.timeout)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
            self._store = dist.PrefixStore(_name_of_attempt(store, self.rank, self.size, self.timeout), store)
            dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.size, timeout=timeout)
            self.hosts = self._gather(socket.gethostname())
        except (RuntimeError, ConnectionLostError) as error:
            raise StoryLLMError(
                f"not all of the {self.size} processes have started within {self.timeout:.0f} seconds; see their "
                f"messages, or raise the environment variable {TIMEOUT}"
            ) from error
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w")
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self.size == 1:
            return
        sys.stdout = self._stdout
        if error is None:
            dist.destroy_process_group()
            return
        try:
            self._report(error)
        except RuntimeError as store_error:
            raise StoryLLMError(f"lost the connection to the machine of rank 0 ({self.hosts[0]})") from store_error

    # Decisions that all processes take together

    def check_same(self, settings: Callable[[], dict[str, Any]]) -> None:
        """Raises StoryLLMError, naming the first difference, unless all processes have the same settings."""
        if self.size == 1:
            return
        first, *others = self._gather(settings())
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if other[name] != value:
                    raise StoryLLMError(
                        f"{self._name(rank)} has {name} {other[name]!r}, {self._name(0)} has {value!r}; start all "
                        "processes with the same recipe, data and version"
                    )

    def broadcast(self, value: T) -> T:
        """The `value` of rank 0."""
        values = [value]
        if self.size > 1:
            with _connection():
                dist.broadcast_object_list(values)
        return values[0]

    def attempt(self, function: Callable[[], T]) -> T:
        """Calls `function`, which calls `sum` once. If one process is interrupted or runs out of memory, all stop.

        The others raise StoppedElsewhere or OutOfMemoryElsewhereError in `sum`. After it they cannot stop together:
        StoryLLMError is raised if this process runs out of memory then.
        """
        self._summed = False
        try:
            return function()
        except (StoppedElsewhere, OutOfMemoryElsewhereError):
            raise
        except (StopRequested, Exception) as error:
            if self.size > 1 and isinstance(error, StopRequested):
                self._exchange(error.args[0])
            elif self.size > 1 and is_out_of_memory(error):
                if self._summed:
                    raise StoryLLMError(
                        f"{self._name(self.rank)} ran out of memory in the optimizer step; set a smaller "
                        "train.micro_batch_size, or use a GPU with more memory"
                    ) from error
                _raise_if_stopped(self._exchange(OUT_OF_MEMORY))
            raise

    def sum(self, a: Any, b: Any = 0) -> tuple[Any, Any]:
        """The sums of two numbers over all processes. At the end of an update, also adds up the gradients."""
        if self.size == 1:
            return a, b
        table = self._exchange(0, float(a), float(b))
        _raise_if_stopped(table)
        for rank, status in enumerate(table[:, 0].tolist()):
            if status == OUT_OF_MEMORY:
                raise OutOfMemoryElsewhereError(self._name(rank))
        self._summed = True
        return table[:, 1].sum(), table[:, 2].sum()

    def _exchange(self, status: int, a: float = 0.0, b: float = 0.0) -> Tensor:
        """(size, 3) statuses and numbers of all processes, after their gradients have been added up."""
        row = torch.tensor([status, a, b], dtype=torch.float64)
        rows = [torch.empty_like(row) for _ in range(self.size)]
        with _connection():
            if self._gradients is not None:
                self._gradients.launch()
            dist.all_gather(rows, row)
            if self._gradients is not None:
                self._gradients.wait()
        return torch.stack(rows)

    def _gather(self, value: T) -> list[T]:
        """The value of each process."""
        values: list[Any] = [None] * self.size
        with _connection():
            dist.all_gather_object(values, value)
        return values

    # Windows and gradients

    def share(self, windows: Tensor) -> Tensor:
        """This process's part of (windows, ...). Shares differ by at most one window, and some may be empty."""
        return windows.tensor_split(self.size)[self.rank]

    def largest_share(self, windows: int) -> int:
        """The size of the largest share of that many windows."""
        return -(-windows // self.size)

    def map_rows(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """`function` of (n, ...) rows, of which each process computes its share. It keeps the shape of the rows."""
        if self.size == 1:
            return function(rows)
        shares = rows.tensor_split(self.size)
        result = function(shares[self.rank])
        padded = result.new_zeros(len(shares[0]), *rows.shape[1:])  # all shares are sent as the largest, the first
        padded[: len(result)] = result
        parts = [torch.empty_like(padded) for _ in shares]
        with _connection():
            dist.all_gather(parts, padded)
        return torch.cat([part[: len(share)] for part, share in zip(parts, shares, strict=True)])

    def connect(self, model: nn.Module) -> None:
        """Gives `model` the weights of rank 0. From now on, `sum` adds up its gradients at the end of an update.

        Raises StoryLLMError if the model is on another device than a CUDA GPU or a CPU.
        """
        if self.size == 1:
            return
        device = next(model.parameters()).device.type
        if device not in ("cpu", "cuda"):
            raise StoryLLMError(f"device is {device}, must be cuda or cpu with several processes; use --train.device")
        with _connection():
            for parameter in model.parameters():
                dist.broadcast(parameter.detach(), src=0)
        self._gradients = GradientSum(model)

    def last_pass_reduces(self, micro_batches: Iterable[T]) -> Iterator[T]:
        """Yields the micro-batches of an update. Gradients are added up from the last one's backward pass on."""
        if self._gradients is None:
            yield from micro_batches
            return
        self._gradients.begin()
        remaining = iter(micro_batches)
        micro_batch = next(remaining, None)
        while micro_batch is not None:
            following = next(remaining, None)
            self._gradients.is_last_pass = following is None
            yield micro_batch
            micro_batch = following

    # Messages

    def describe(self, windows: int) -> dict[str, Any]:
        """The log's description of the processes, and of their shares of that many windows."""
        shares = [len(share) for share in torch.empty(windows).tensor_split(self.size)]
        return {"world_size": self.size, "hosts": self.hosts, "windows_per_process": shares}

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    def _report(self, error: BaseException) -> None:
        """Lets the others know that this process ends. Raises the error that replaces `error`, if any."""
        self._store.set(f"ended {self.rank}", "")
        if isinstance(error, ConnectionLostError):
            keys = [f"ended {rank}" for rank in range(self.size)]
            deadline = time.monotonic() + REPORT_SECONDS
            while not self._store.check(keys) and time.monotonic() < deadline:
                time.sleep(0.05)
            lost = [self._name(rank) for rank, key in enumerate(keys) if not self._store.check([key])]
            if not lost:  # the first to end has reported why
                raise SystemExit(2)
            error = StoryLLMError(
                f"lost {' and '.join(lost)}: killed, not connected, or silent for {self.timeout:.0f} seconds; run the "
                "same command again to resume"
            )
        if isinstance(error, StoryLLMError):
            if self._store.add(f"message {error}", 1) > 1:  # others raise the same error, and one reports it
                raise SystemExit(2)
            raise error


class GradientSum:
    """Adds up the gradients of a model over all processes, in buckets, while the last backward pass is running."""

    def __init__(self, model: nn.Module) -> None:
        self.is_last_pass = False
        self._buckets: list[list[nn.Parameter]] = [[]]
        for parameter in reversed(list(model.parameters())):  # about the order in which their gradients are complete
            if self._buckets[-1] and sum(p.nbytes for p in self._buckets[-1]) + parameter.nbytes > BUCKET_BYTES:
                self._buckets.append([])
            self._buckets[-1].append(parameter)
            parameter.register_post_accumulate_grad_hook(self._on_gradient)
        self._flat = [bucket[0].new_zeros(sum(p.numel() for p in bucket)) for bucket in self._buckets]
        self._bucket_of = {p: number for number, bucket in enumerate(self._buckets) for p in bucket}
        self._incomplete: list[int] = []  # gradients of each bucket that the last pass has not reached
        self._works: list[Any] | None = None  # the reductions launched in this update; None between updates

    def begin(self) -> None:
        """Begins an update. Gradients are zero, and views of the buckets."""
        self.is_last_pass, self._works = False, []
        self._incomplete = [len(bucket) for bucket in self._buckets]
        for flat, bucket in zip(self._flat, self._buckets, strict=True):
            flat.zero_()
            for parameter, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = part.view_as(parameter)

    def _on_gradient(self, parameter: Tensor) -> None:
        if self.is_last_pass and self._works is not None:
            self._incomplete[self._bucket_of[parameter]] -= 1  # type: ignore[index]
            while len(self._works) < len(self._buckets) and self._incomplete[len(self._works)] == 0:
                self._launch_next()

    def _launch_next(self) -> None:
        assert self._works is not None
        with _connection():
            self._works.append(dist.all_reduce(self._flat[len(self._works)], async_op=True))

    def launch(self) -> None:
        """Launches the reductions that the last pass has not: this process has no windows, or has failed."""
        while self._works is not None and len(self._works) < len(self._buckets):
            self._launch_next()

    def wait(self) -> None:
        """Waits until all reductions are complete, which ends the update."""
        for work in self._works or []:
            work.wait()
        self._works = None


def torchrun_processes(device: str) -> Processes:
    """The processes that torchrun has started, each with its own GPU unless `device` is "cpu"; one without torchrun.

    Raises StoryLLMError if there are too few GPUs, or if STORYLLM_TIMEOUT is not a number of seconds.
    """
    rank, size = _rank_and_size()
    if size == 1:
        return Processes()
    if torch.cuda.is_available() and device != "cpu":
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device not in ("auto", "cuda"):
            raise StoryLLMError(f"device is {device!r}, must be 'auto', 'cuda' or 'cpu' with several processes")
        if local_rank >= gpus:
            raise StoryLLMError(
                f"{os.environ['LOCAL_WORLD_SIZE']} processes need a GPU each, this machine has {gpus}; use "
                f"--nproc_per_node={gpus}, or --train.device cpu"
            )
        torch.cuda.set_device(local_rank)
    value = os.environ.get(TIMEOUT, str(DEFAULT_TIMEOUT))
    try:
        timeout = float(value)
    except ValueError:
        timeout = 0.0
    if not 1 <= timeout <= 86_400:
        raise StoryLLMError(f"{TIMEOUT} is {value!r}, must be a number of seconds from 1 to 86400")
    return Processes(rank, size, timeout)


def process_prefix() -> str:
    """What begins the messages of this process: "rank 1 on HOST: ", or nothing if it is alone."""
    rank, size = _rank_and_size()
    return f"rank {rank} on {socket.gethostname()}: " if size > 1 else ""


def is_first_process() -> bool:
    """True unless torchrun has started this process with another rank than 0."""
    return _rank_and_size()[0] == 0


def tell_torchrun(message: str) -> None:
    """Gives torchrun, if it has started this process, the error for the summary that it prints."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        error = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": error}), encoding="utf-8")


def _rank_and_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_torchelastic_launched():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def _name_of_attempt(store: Any, rank: int, size: int, timeout: float) -> str:
    """A name that these processes agree on, and none before them had.

    When torchrun restarts the processes, the store still has the addresses of those that have ended. So rank 0 chooses
    a name, the others register under it, and start when they are among its members.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", own)
        members = [store.get(f"{own} {other}").decode() for other in range(1, size)]  # waits for them
        store.set(f"{own} members", json.dumps(members))
        return own
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        name = store.get("attempt").decode()  # perhaps still that of the last attempt
        store.set(f"{name} {rank}", own)
        if store.check([f"{name} members"]) and own in json.loads(store.get(f"{name} members")):
            return name
        time.sleep(0.02)
    raise ConnectionLostError("rank 0 did not start")


def _raise_if_stopped(table: Tensor) -> None:
    if (signum := int(table[:, 0].max())) > 0:
        raise StoppedElsewhere(signum)


@contextmanager
def _connection() -> Iterator[None]:
    """Turns errors of communication into ConnectionLostError."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionLostError(str(error)) from error
