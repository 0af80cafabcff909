"""A conversion from folder to folder: preflight, convert, write, resumable."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from hf_topk.console import as_json
from hf_topk.inspection.facts import Facts
from hf_topk.inspection.page import make_page
from hf_topk.model.errors import InputError, TopKExpertsError

from .checkpoint.agreement_plot import measure_around
from .checkpoint.write import write_checkpoint
from .hub import Destination, upload
from .load_dense import DeviceMap, check_device_map, dtype_to_compute_in, stored_type
from .pipeline import convert_checked
from .preflight import Plan, preflight
from .processes import Processes, launched_processes
from .recipe import Recipe
from .report import Report
from .steps.choose_operating_point import TargetNotReachedError
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
    html_report: bool = False,
) -> Report:
    """Convert a dense checkpoint into a folder that loads with `AutoModelForCausalLM.from_pretrained`.

    With several processes of `accelerate launch`, call this in the main process, and [`processes.run_worker`] where
    [`processes.is_worker`] is true.

    Args:
        model: a folder, a repository of the Hub, or None for the bundled demo model.
        out: the folder to write, completely or not at all.
        recipe: every choice.
        overwrite: replace an earlier converted model, and discard an interrupted conversion.
        resume: continue an interrupted conversion of the same model, text and recipe.
        device_map: of the dense model, as `from_pretrained` takes it; RAM if None.
        destination: on the Hub; None to upload nothing.
        html_report: whether to write the report as one HTML page, `report.html`, beside the card.

    Returns:
        The converted model and its metrics.

    Raises:
        InputError: when an input is refused; nothing is written then.
        TargetNotReachedError: when the target agreement is not reached; nothing is written then.
        TopKExpertsError: when writing fails; the hidden states are kept for `resume`.
        UploadError: when the upload fails; the folder is complete then.
    """
    check_device_map(device_map)
    with launched_processes() as processes:
        return _convert_checkpoint(
            model, Path(out), recipe, overwrite, resume, device_map, destination, html_report, processes
        )


def _convert_checkpoint(
    model: str | None,
    out: Path,
    recipe: Recipe,
    overwrite: bool,
    resume: bool,
    device_map: DeviceMap | None,
    destination: Destination | None,
    html_report: bool,
    processes: Processes,
) -> Report:
    if not out.name or ".." in out.parts:  # '.', 'a/../b': the work folder beside it needs its real name
        out = out.resolve()
    work = work_folder(out)
    missing = [folder for folder in work.parents if not folder.exists()]
    if work.exists() and not (resume or overwrite):
        raise InputError(
            f"a conversion to {out} was interrupted: continue it with --resume, or start over with --overwrite"
        )
    plan = preflight(model, out, recipe, overwrite=overwrite, destination=destination)
    fingerprint = _fingerprint(plan)
    resumes = resume and _can_resume(work, fingerprint)
    place = processes.place(device_map)
    dense = processes.load(plan.source, place, dtype_to_compute_in(plan.source, place))
    try:
        if not resumes:
            _start_over(work, fingerprint)
        report = convert_checked(
            dense,
            plan.tokenizer,
            plan.recipe,
            plan.windows,
            work,
            processes=processes,
            stored_type=stored_type(plan.source),
        )
        report.curve = measure_around(report.model, report.dense_argmax)
    except (InputError, TargetNotReachedError):
        shutil.rmtree(work)  # the same input would be refused again
        with contextlib.suppress(OSError):  # not empty: someone else uses it
            for folder in missing:
                folder.rmdir()
        raise
    except OSError as error:
        raise TopKExpertsError(
            f"cannot write to {work}: {error.strerror}; fix this and run the same command with --resume"
        ) from error
    write_checkpoint(report, plan.source, plan.out, place, _page(report, plan) if html_report else None)
    shutil.rmtree(work)
    if plan.destination:
        report.uploaded = upload(plan.out, plan.destination)
    return report


def _page(report: Report, plan: Plan) -> str:
    """The report as HTML, with the metrics as they are in the folder."""
    metrics = json.loads(as_json(report.metrics()))
    facts = Facts(plan.out.name, report.model, plan.tokenizer, metrics, report.recipe.to_dict(), report.observations)
    return make_page(facts)


def work_folder(out: Path) -> Path:
    """The folder of a conversion's resumable state, beside its output folder."""
    return out.parent / f".{out.name}.work"


def _fingerprint(plan: Plan) -> dict[str, Any]:
    return {"model": plan.source.fingerprint(), "text": plan.text_fingerprint, "recipe": plan.recipe.to_dict()}


def _can_resume(work: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether there is an interrupted conversion; raises InputError if its inputs differ."""
    record = read_record(work / FINGERPRINT_FILE)
    if not record:
        return False
    changed = [name for name in ("model", "text") if record[name] != fingerprint[name]]
    changed += [name for name, value in fingerprint["recipe"].items() if record["recipe"].get(name) != value]
    if changed:
        raise InputError(
            f"cannot resume, since these inputs have changed: {', '.join(dict.fromkeys(changed))}; "
            "use the inputs of the interrupted conversion, or start over with --overwrite"
        )
    return True


def _start_over(work: Path, fingerprint: dict[str, Any]) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_record(work / FINGERPRINT_FILE, fingerprint)
