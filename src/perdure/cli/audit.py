"""`perdure audit`: whether the tasks that a run learned first still give the same outputs, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from perdure.cli.output import DataRoot, Json, only_results_on_stdout, print_json, say

if TYPE_CHECKING:
    from perdure.experiments.audit import Audit

Device = Annotated[str | None, Parameter(help="Where to compute; default: where the run was trained.")]


def audit(
    folder: Annotated[Path, Parameter(help="The folder of a task-incremental run, or a checkpoint inside of it.")],
    /,
    *,
    data_root: DataRoot = None,
    device: Device = None,
    json: Json = False,
) -> int:
    """Rebuild the model of a run and compare the outputs of old tasks, bit for bit; exit code 1 if one has changed."""
    from perdure.experiments.audit import audit as audit_run

    with only_results_on_stdout():
        found = audit_run(folder, data_root=data_root, device=device)
    passed = all(each.passed for each in found)
    if json:
        print_json({"folder": str(folder), "passed": passed, "runs": [each.to_dict() for each in found]})
    else:
        print("\n\n".join(_text(each) for each in found))
        for each in found:
            _say_if_not_reproduced(each)
    return 0 if passed else 1


def _text(audit: Audit) -> str:
    names = audit.task_names
    lines = [f"{audit.label}, seed {audit.seed}, {audit.checkpoint}"]
    if audit.rows:
        wide = [max(len(head), *(len(name) for name in names)) for head in ("task", "after task")]
        lines += ["", f"{'task':<{wide[0]}}  {'after task':<{wide[1]}}  {audit.compared}"]
        for row in audit.rows:
            verdict = "equal" if row.equal else "changed"
            source = "  (recomputed)" if row.recomputed else ""
            lines.append(f"{names[row.task]:<{wide[0]}}  {names[row.after]:<{wide[1]}}  {verdict}{source}")
    return "\n".join([*lines, "", _verdict(audit)])


def _verdict(audit: Audit) -> str:
    old = len({row.task for row in audit.rows})
    if not old:
        return "no task has been followed by another yet, so there is nothing to compare"
    if not audit.changed:
        return f"{audit.label}: all {old} old tasks give bit-identical {audit.compared} after every later task"
    names = audit.task_names
    which = ", ".join(f"'{names[task]}' (by '{names[after]}')" for task, after in audit.changed.items())
    return f"{audit.label}: {len(audit.changed)} of {old} old tasks changed: {which}"


def _say_if_not_reproduced(audit: Audit) -> None:
    if audit.reproduced is not None and not all(audit.reproduced):
        wrong = [audit.task_names[task] for task, same in enumerate(audit.reproduced) if not same]
        say(
            f"{audit.checkpoint} does not give the outputs that its run had for {', '.join(wrong)}: the file or the "
            "code has changed, or this machine or version of torch rounds otherwise than the run's"
        )
