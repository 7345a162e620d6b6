"""Two processes under DistributedDataParallel take the same steps as one with the whole batch."""

import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import perdure
from perdure.errors import PerdureWarning
from perdure.methods import EWC, SI, Replay


def train(model: nn.Module, rows: slice) -> perdure.Learner:
    warnings.simplefilter("ignore", PerdureWarning)
    generator = torch.Generator().manual_seed(0)
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    learner = perdure.Learner(model, optimizer, [EWC(strength=1), SI(strength=0.1)])
    for task in range(2):
        x, y = torch.randn(64, 12, generator=generator), torch.randint(0, 3, (64,), generator=generator)
        learner.begin_task(str(task), (x, y))
        for start in range(0, 64, 16):
            learner.step(x[start : start + 16][rows], y[start : start + 16][rows])
        learner.end_task()
    return learner


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(perdure.models.MLP(12, [9], 3, seed=0))
    learner = train(model, slice(8 * rank, 8 * rank + 8))
    torch.save({"theta": learner.parameters.theta, "names": list(learner.parameters.members)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = train(perdure.models.MLP(12, [9], 3, seed=0), slice(None))
    assert one["names"] == list(whole.parameters.members), "names are without the wrapper's prefix"
    assert torch.equal(one["theta"], two["theta"])
    torch.testing.assert_close(one["theta"], whole.parameters.theta, rtol=0, atol=1e-5)


def test_remembered_rows_go_through_the_wrapper(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(perdure.models.MLP(12, [9], 3, seed=0))
        learner = perdure.Learner(model, partial(torch.optim.SGD, lr=0.05), [Replay(20, forward="separate")])
        plain = perdure.Learner(
            perdure.models.MLP(12, [9], 3, seed=0), partial(torch.optim.SGD, lr=0.05), [Replay(20, forward="separate")]
        )
        x, y = torch.randn(40, 12), torch.arange(40) % 3
        for start in range(0, 40, 8):
            for each in (learner, plain):
                each.partial_fit(x[start : start + 8], y[start : start + 8])
        assert torch.equal(learner.parameters.theta, plain.parameters.theta)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
