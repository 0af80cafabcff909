"""A conversion from folder to folder: preflight, convert, write, with what it takes to resume."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from hf_topk.model.errors import InputError, TopKExpertsError

from .checkpoint.agreement_plot import measure_around
from .checkpoint.write import write_checkpoint
from .hub import Destination, upload
from .load_dense import DeviceMap, check_device_map, stored_type, type_to_compute_in
from .pipeline import convert_checked
from .preflight import Plan, preflight
from .processes import Processes, launched_processes
from .recipe import Recipe
from .report import Report
from .steps.calibrate import TargetNotReachedError
from .steps.hidden_states import read_record, write_record

FINGERPRINT_FILE = "fingerprint.json"


def convert_checkpoint(
    model: str | None,
    out: str | Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    resume: bool = False,
    device_map: DeviceMap | None = None,
    destination: Destination | None = None,
) -> Report:
    """Convert a dense checkpoint into a folder that loads with `AutoModelForCausalLM.from_pretrained`.

    Where `accelerate launch` has started several processes, call this in the first one, and
    [`processes.help_first_process`] in those where [`processes.is_helper`] is true.

    Args:
        model: a folder, a repository of the Hub, or None for the bundled demo model.
        out: the folder to write: whole or not at all.
        recipe: every choice.
        overwrite: whether to replace an earlier converted model, and to throw away an interrupted conversion.
        resume: whether to go on with an interrupted conversion of the same model, text and recipe.
        device_map: where the dense model goes, as `from_pretrained` takes it; main memory if None.
        destination: where on the Hub the folder is uploaded to, if it is.

    Returns:
        The converted model and its figures.

    Raises:
        InputError: when an input is refused; nothing has been written then.
        TargetNotReachedError: when the target agreement is not reached; nothing has been written then.
        TopKExpertsError: when writing fails; what was computed is kept for `resume`.
        UploadError: when the upload fails; the folder is whole then.
    """
    check_device_map(device_map)
    with launched_processes() as processes:
        return _convert_checkpoint(model, Path(out), recipe, overwrite, resume, device_map, destination, processes)


def _convert_checkpoint(
    model: str | None,
    out: Path,
    recipe: Recipe,
    overwrite: bool,
    resume: bool,
    device_map: DeviceMap | None,
    destination: Destination | None,
    processes: Processes,
) -> Report:
    if not out.name or ".." in out.parts:  # '.', 'a/../b': what lies beside it needs the folder's own name
        out = out.resolve()
    work = work_folder(out)
    missing = [folder for folder in work.parents if not folder.exists()]
    if work.exists() and not (resume or overwrite):
        raise InputError(f"a conversion to {out} was interrupted: go on with --resume, or start anew with --overwrite")
    plan = preflight(model, out, recipe, overwrite=overwrite, destination=destination)
    fingerprint = _fingerprint(plan)
    goes_on = resume and _can_resume(work, fingerprint)
    place = processes.place(device_map)
    dense = processes.load(plan.source, place, type_to_compute_in(plan.source, place))
    try:
        if not goes_on:
            _start_anew(work, fingerprint)
        report = convert_checked(
            dense,
            plan.tokenizer,
            plan.recipe,
            plan.windows,
            work,
            processes=processes,
            stored_type=stored_type(plan.source),
        )
        report.curve = measure_around(report.model, report.choices)
    except (InputError, TargetNotReachedError):
        shutil.rmtree(work)  # the same input would be refused again
        with contextlib.suppress(OSError):  # somebody else put something there
            for folder in missing:
                folder.rmdir()
        raise
    except OSError as error:
        raise TopKExpertsError(
            f"cannot write to {work}: {error.strerror}; mend that and run the same command with --resume"
        ) from error
    write_checkpoint(report, plan.source, plan.out, place)
    shutil.rmtree(work)
    if plan.destination:
        report.uploaded = upload(plan.out, plan.destination)
    return report


def work_folder(out: Path) -> Path:
    """Where a conversion keeps what it needs to be resumed: beside its output folder."""
    return out.parent / f".{out.name}.work"


def _fingerprint(plan: Plan) -> dict[str, Any]:
    return {"model": plan.source.fingerprint(), "text": plan.text_fingerprint, "recipe": plan.recipe.to_dict()}


def _can_resume(work: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether there is an interrupted conversion; refuses one of something else."""
    record = read_record(work / FINGERPRINT_FILE)
    if not record:
        return False
    changed = [name for name in ("model", "text") if record[name] != fingerprint[name]]
    changed += [name for name, value in fingerprint["recipe"].items() if record["recipe"].get(name) != value]
    if changed:
        raise InputError(
            f"cannot resume, since this has changed: {', '.join(dict.fromkeys(changed))}; "
            "use what the interrupted conversion was started with, or start anew with --overwrite"
        )
    return True


def _start_anew(work: Path, fingerprint: dict[str, Any]) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_record(work / FINGERPRINT_FILE, fingerprint)
