"""What `import perdure` shows and what it costs."""

import subprocess
import sys

import pytest

import perdure
import perdure.methods
import perdure.models


@pytest.mark.parametrize("module", [perdure, perdure.methods, perdure.models])
def test_every_exported_name_exists_and_is_listed(module: object) -> None:
    for name in module.__all__:  # type: ignore[attr-defined]
        assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_importing_perdure_imports_nothing_else() -> None:
    script = "import sys; before = set(sys.modules); import perdure; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {
        "torch",
        "numpy",
        "yaml",
        "cattrs",
        "joblib",
        "cyclopts",
        "rich",
        "matplotlib",
        "optuna",
        "pandas",
        "PIL",
        "safetensors",
    }
    assert not {name.split(".")[0] for name in done.stdout.split()} & heavy


def test_the_learner_needs_no_optional_dependency() -> None:
    script = (
        "import sys\n"
        "for name in ('matplotlib', 'optuna', 'pandas', 'PIL', 'scipy', 'sklearn'): sys.modules[name] = None\n"
        "import perdure\n"
        "stream = perdure.benchmarks.split_digits(seed=0)\n"
        "results = perdure.Learner(perdure.models.MLP(64, [8], 10, seed=0)).fit(stream, steps=2)\n"
        "print(results.metrics()['final_average_accuracy'] is not None)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr


def test_use_does_not_touch_global_state() -> None:
    script = (
        "import random, numpy, torch\n"
        "state = random.getstate(), numpy.random.get_state()[1].tobytes(), torch.get_rng_state()\n"
        "threads = torch.get_num_threads()\n"
        "import perdure\n"
        "from perdure.methods import DERpp\n"
        "stream = perdure.benchmarks.split_digits(seed=0)\n"
        "perdure.Learner(perdure.models.MLP(64, [8], 10, seed=0), methods=[DERpp(10)]).fit(stream, steps=3)\n"
        "assert random.getstate() == state[0] and numpy.random.get_state()[1].tobytes() == state[1]\n"
        "assert torch.equal(torch.get_rng_state(), state[2]) and torch.get_num_threads() == threads\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
