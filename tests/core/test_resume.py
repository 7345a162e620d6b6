"""A run stopped at any step and resumed in a fresh process gives bit-identical weights, buffers and results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from perdure.checkpoint import load_state
from perdure.folder import RunFolder

STOPS = (1, 9, 12, 21)
"""Updates before which runs stop: before the first checkpoint, inside a task, at a boundary, inside a later task."""

SCRIPT = """
import sys, warnings
from functools import partial
from pathlib import Path
import torch
import perdure
from perdure import methods
from perdure.errors import PerdureWarning

root, stop, cases = Path(sys.argv[1]), int(sys.argv[2]), [case.split(":") for case in sys.argv[3:]]
warnings.simplefilter("ignore", PerdureWarning)
torch.set_num_threads(1)
BUILD = {
    "finetune": lambda: [],
    "joint": lambda: [methods.Joint()],
    "l2": lambda: [methods.L2(strength=0.1)],
    "ewc": lambda: [methods.EWC(strength=1, n_samples=50)],
    "ewc_online_prox": lambda: [methods.EWC(strength=1, n_samples=50, mode="online", gamma=0.5, solver="prox")],
    "si": lambda: [methods.SI(strength=0.1)],
    "penalties": lambda: [methods.EWC(strength=1), methods.MAS(strength=0.01), methods.SI(strength=0.1)],
    "lwf": lambda: [methods.LwF()],
    "kd": lambda: [methods.KD(replayed=True), methods.Replay(capacity=30)],
    "momentum_kd": lambda: [methods.MomentumKD(), methods.Replay(capacity=30)],
    "vcl": lambda: [methods.VCL(coreset=5, coreset_steps=3, samples=2)],
    "replay": lambda: [methods.Replay(capacity=30)],
    "replay_balanced": lambda: [methods.Replay(capacity=30, writing="class_balanced", reading="class_balanced")],
    "der": lambda: [methods.DER(capacity=30)],
    "derpp": lambda: [methods.DERpp(capacity=30)],
    "gem": lambda: [methods.GEM(per_task=10)],
    "agem": lambda: [methods.AGEM(per_task=10)],
    "er_ace": lambda: [methods.ERACE(capacity=30)],
    "mir": lambda: [methods.MIR(capacity=30, candidates=12, batch_size=6, compare_to_old_logits=True)],
    "gdumb": lambda: [methods.GDumb(capacity=30, epochs=2)],
    "icarl": lambda: [methods.ICaRL(capacity=40)],
    "wa": lambda: [methods.WA(capacity=40)],
    "bic": lambda: [methods.BiC(capacity=40)],
    "spg": lambda: [methods.SPG()],
    "hat": lambda: [methods.HAT()],
    "generative": lambda: [methods.GenerativeReplay(hidden=[16], latent=4, conditional=True)],
    "many": lambda: [methods.LwF(), methods.EWC(strength=1, n_samples=50), methods.DERpp(capacity=30)],
}

class Stop(Exception):
    pass

for name, head in cases:
    folder = root / name
    begun = (folder / "checkpoint").is_dir()
    # What a checkpoint restores is made different on purpose: dropout's generator and the model's first weights.
    torch.manual_seed(99 if begun else 11)
    mlp = perdure.models.MLP(64, [20], 10, head=head, seed=7 if begun else 2)
    if name == "vcl":
        mlp = perdure.models.mean_field(mlp, seed=4 if begun else 5)
    stream = perdure.benchmarks.split_digits(scenario="task" if head == "multi" else "class", tasks=5, seed=1)
    learner = perdure.Learner(torch.nn.Sequential(torch.nn.Dropout(0.1), mlp), partial(torch.optim.Adam, lr=1e-2),
                              BUILD[name](), seed=1, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.9))
    step = learner.step

    def counted(*args, **kwargs):
        if stop and learner.passes["steps"] == stop:
            raise Stop
        return step(*args, **kwargs)

    learner.step = counted
    try:
        learner.fit(stream, steps=6, batch_size=16, evaluate_every=4, folder=folder, checkpoint_every=2, resume=True)
    except Stop:
        continue
    assert not stop, "the run should have been stopped"
"""


def final(folder: Path) -> tuple[dict, dict, list]:
    state = load_state(RunFolder(folder).saved()[-1])
    state["position"].pop("seconds")
    results = json.loads((folder / "results.json").read_text())
    for key in ("seconds", "peak_memory_bytes"):
        results.pop(key)
    return state, results, RunFolder(folder).events()


def equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


CASES = [
    ("finetune", "wide"),
    ("joint", "wide"),
    ("l2", "wide"),
    ("ewc", "wide"),
    ("ewc_online_prox", "growing"),
    ("si", "growing"),
    ("penalties", "growing"),
    ("lwf", "multi"),
    ("kd", "wide"),
    ("momentum_kd", "growing"),
    ("vcl", "multi"),
    ("replay", "wide"),
    ("replay_balanced", "multi"),
    ("der", "growing"),
    ("derpp", "wide"),
    ("gem", "wide"),
    ("agem", "multi"),
    ("er_ace", "growing"),
    ("mir", "multi"),
    ("gdumb", "multi"),
    ("icarl", "growing"),
    ("wa", "wide"),
    ("bic", "growing"),
    ("spg", "multi"),
    ("hat", "multi"),
    ("generative", "growing"),
    ("many", "growing"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case once in a single process, and once over five processes, stopped in between."""
    root = tmp_path_factory.mktemp("runs")
    for part, stops in (("whole", (0,)), ("cut", (*STOPS, 0))):
        for stop in stops:
            cases = [f"{name}:{head}" for name, head in CASES]
            command = [sys.executable, "-c", SCRIPT, str(root / part), str(stop), *cases]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("name", [name for name, _ in CASES])
def test_stopped_and_resumed_equals_uninterrupted(name: str, runs: Path) -> None:
    whole, cut = final(runs / "whole" / name), final(runs / "cut" / name)
    assert equal(whole[0], cut[0])
    assert whole[1] == cut[1]
    assert whole[2] == cut[2], "the log holds the same events, each once"
    assert whole[0]["position"]["updates"] == 30
