"""Digits 0 to 4, then 5 to 9, with and without replay: what is left of the first task while the second is learned?

    perdure data get mnist && python examples/replay_mnist.py    # or PERDURE_DATA=folder; a minute or two
    python examples/replay_mnist.py --data digits --epochs 20    # embedded data, seconds

The tutorial of the Neurenix document, with torch in place of its tensors and with its mistakes corrected; each
correction says why. The plot needs matplotlib: pip install 'perdure[plot]'.
"""

from __future__ import annotations

import argparse

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import perdure
from perdure.continual import ExperienceReplay

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="mnist", choices=["mnist", "digits"])
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--memory", type=int, default=1000)
parser.add_argument("--out", default="experience_replay_comparison.png")
options = parser.parse_args()

arrays = perdure.data.load(options.data)
white = arrays.x.max()


def digits(x: Tensor, y: Tensor, task: int) -> TensorDataset:
    """The images of one task as vectors in [0, 1].

    Their labels stay 0 to 9. The document maps 5 to 9 onto 0 to 4, which gives a nought and a five the same output: two
    classes that replay then has to force into one.
    """
    chosen = y // 5 == task
    return TensorDataset(x[chosen].flatten(1) / white, y[chosen])


def loader(task: int) -> DataLoader:
    # A generator of its own: without one, the order of the batches depends on whatever else draws random numbers, and
    # the two runs would be compared on different data.
    data = digits(arrays.x, arrays.y, task)
    return DataLoader(data, batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(task))


def evaluate(model: nn.Module, task: int) -> float:
    """Accuracy on a task's test images among all ten digits: with replay, nobody has to say which task it is."""
    x, y = digits(arrays.x_test, arrays.y_test, task).tensors
    model.eval()
    with torch.no_grad():  # the document builds a graph for every test batch
        outputs = model(x)
    model.train()  # ... and leaves the model in evaluation mode after the last epoch
    return (outputs.argmax(dim=1) == y).float().mean().item()


def run(memory_size: int) -> list[tuple[float, float]]:
    """Accuracies on both tasks after task 1, and after every epoch of task 2."""
    # Both runs begin with the same weights; in the document the second one begins with others.
    torch.manual_seed(0)
    inputs = arrays.x[0].numel()
    model = nn.Sequential(nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    loss_fn = nn.CrossEntropyLoss()
    replay = ExperienceReplay(model, memory_size=memory_size, replay_ratio=0.5)
    accuracies = []
    for task in (0, 1):
        batches = loader(task)
        for epoch in range(options.epochs):
            for x, y in batches:
                # Before the step or after it, both work: a batch is not replayed in its own step, and the copies that
                # later epochs bring are not stored again.
                replay.add_to_memory(x, y, task_id=task)
                if task == 0:
                    # The document's first task is trained by hand. What replay needs of it is in the memory.
                    optimizer.zero_grad()
                    loss_fn(model(x), y).backward()
                    optimizer.step()
                else:
                    replay.train_step(optimizer, loss_fn, x, y, task_id=task)
            if task == 1 or epoch == options.epochs - 1:
                accuracies.append((evaluate(model, 0), evaluate(model, 1)))
                print(f"task {task + 1}, epoch {epoch + 1}: {accuracies[-1][0]:.1%} and {accuracies[-1][1]:.1%}")
    return accuracies


print(f"with replay ({options.memory} images): accuracy on digits 0 to 4 and on 5 to 9")
with_replay = run(options.memory)
print("without replay")  # an empty memory is plain training, bit for bit
without = run(0)

figure, panels = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
for task, panel in enumerate(panels):
    panel.plot([pair[task] for pair in with_replay], "g-o", label="with experience replay")
    panel.plot([pair[task] for pair in without], "r--s", label="without experience replay")
    panel.set_title(f"Task {task + 1} (digits {5 * task} to {5 * task + 4}) while task 2 is learned")
    panel.set_xlabel("Epoch of task 2 (0: before it)")
    panel.set_xticks(range(0, options.epochs + 1, max(1, options.epochs // 5)))
    panel.set_ylim(-0.03, 1.03)
    panel.grid(alpha=0.3)
    panel.legend(loc="center right")
panels[0].set_ylabel("Test accuracy")
figure.savefig(options.out, dpi=120)
print(f"wrote {options.out}")
