"""The callbacks need extras; perdure does not."""

import subprocess
import sys

import pytest


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_integrations_imports_no_trainer() -> None:
    script = "import sys, perdure, perdure.integrations; print(dir(perdure.integrations), *sys.modules)"
    found = run(script)
    assert found.startswith("['lightning', 'transformers']")
    assert not {"lightning", "transformers", "accelerate", "torch"} & set(found.split())


@pytest.mark.parametrize(("name", "missing"), [("lightning", "lightning"), ("transformers", "accelerate")])
def test_a_missing_extra_says_what_to_install(name: str, missing: str) -> None:
    script = (
        f"import sys; sys.modules['{missing}'] = None\n"
        "import perdure\n"
        "from perdure.errors import MissingExtraError\n"
        f"try: perdure.integrations.{name}\n"
        "except MissingExtraError as error: print(error)\n"
    )
    assert f"pip install 'perdure[{name}]'" in run(script)
