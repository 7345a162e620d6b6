"""The callbacks need extras; perdure does not."""

import subprocess
import sys


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_integrations_imports_no_trainer() -> None:
    script = "import sys, perdure, perdure.integrations; print(dir(perdure.integrations), *sys.modules)"
    found = run(script)
    assert found.startswith("['lightning', 'transformers']")
    assert not {"lightning", "transformers", "accelerate", "torch"} & set(found.split())


def test_a_missing_extra_says_what_to_install() -> None:
    script = (
        "import sys; sys.modules['lightning'] = sys.modules['accelerate'] = None\n"
        "import perdure\n"
        "from perdure.errors import MissingExtraError\n"
        "for name in ('lightning', 'transformers'):\n"
        "    try: getattr(perdure.integrations, name)\n"
        "    except MissingExtraError as error: print(error)\n"
    )
    first, second = run(script).splitlines()
    assert first == "perdure.integrations.lightning needs lightning; pip install 'perdure[lightning]' installs it"
    assert "pip install 'perdure[transformers]'" in second
