"""Uploads a converted model to the Hub: checks permissions first, then makes a single commit."""

import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants, is_offline_mode
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is httpx's or httpx2's own
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from hf_topk.evaluation.observations import OBSERVATIONS_FILE, Observations
from hf_topk.inspection.page import REPORT_FILE
from hf_topk.model.configuration_topk_experts import TopKExpertsConfig
from hf_topk.model.errors import INTERRUPTED, InputError, TopKExpertsError, one_line
from hf_topk.model.hub_card import CARD_FILE, named

from .recipe import RECIPE_FILE, public_name
from .source import open_source, read_json

MAY_WRITE = ("write", "admin")  # roles of tokens with all write permissions of their owner
NOT_FOUND, TOO_MANY_REQUESTS, SERVER_ERROR = 404, 429, 500
NOT_IMPLEMENTED = (NOT_FOUND, 405, 501)  # by servers that have only the part of the Hub's API that uploads need
CACHES = ("__pycache__",)
WAYS_OUT = {
    401: "run `hf auth login --force`, or change HF_TOKEN, which takes precedence",
    403: "use a token that may write to this repository, ask for access to it, or open a pull request with --create-pr",
}


class UploadError(TopKExpertsError):
    """An upload failed; the local folder is complete, and the repository has all of it or nothing."""


@dataclasses.dataclass(frozen=True)
class Destination:
    """The place on the Hub to upload a converted model to.

    Attributes:
        repository: "owner/name", or only the name for one of the user's own; created if missing.
        private: whether to create it as a private one.
        revision: the branch, created if missing, or "refs/pr/NUMBER"; None for main.
        create_pr: whether to open a pull request instead of committing to the branch.
    """

    repository: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False


@dataclasses.dataclass(frozen=True)
class Uploaded:
    """The commit of an upload.

    Attributes:
        repository: "owner/name".
        commit: its hash.
        url: of the commit or pull request.
    """

    repository: str
    commit: str
    url: str


def push(folder: Path, destination: Destination) -> Uploaded:
    """Upload a converted model's folder.

    Args:
        folder: written by a conversion or `save_pretrained`.
        destination: where to upload it.

    Raises:
        InputError: when the folder is not a complete converted model, or the destination is refused.
        UploadError: when the upload fails.
    """
    _check_folder(folder)
    return upload(folder, check_destination(destination))


def check_destination(destination: Destination) -> Destination:
    """Check login, name, permissions and revision before the conversion, which the Hub would refuse after it.

    Args:
        destination: where to upload a model.

    Returns:
        The destination, with the repository's owner.

    Raises:
        InputError: when it is refused, or the Hub cannot be reached.
    """
    name = destination.repository
    if destination.create_pr and destination.revision:
        raise InputError("a pull request is opened against main: leave out --revision, or --create-pr")
    if is_offline_mode():
        raise InputError(
            f"cannot push to {name} offline: unset HF_HUB_OFFLINE; a converted folder can be pushed later with "
            "`hf-topk push DIR REPO`"
        )
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{name} is not a valid repository name: write OWNER/NAME, as in me/gemma-topk") from error
    with _explained(f"cannot push to {name}", InputError):
        user = _answer(_api().whoami) or {}
        if _role(user) == "read":
            raise InputError(
                f"the token of {user['name']} is read-only: create one with write permission at "
                f"{constants.ENDPOINT}/settings/tokens, and log in with `hf auth login`"
            )
        if "/" not in name:
            if not user:
                raise InputError(f"{constants.ENDPOINT} does not tell the token's user: write OWNER/{name}")
            destination = dataclasses.replace(destination, repository=f"{user['name']}/{name}")
        _check_repository(destination, user)
    return destination


def upload(folder: Path, destination: Destination) -> Uploaded:
    """Upload a folder in one commit; folder and destination are checked already.

    Args:
        folder: of a converted model.
        destination: where to upload it, with the repository's owner.

    Raises:
        UploadError: when it fails; the repository's files are then unchanged, but it or a branch may have been created.
    """
    repository, api = destination.repository, _api()
    again = f"{folder} is complete: push it again with `{_command(folder, destination)}`"
    try:
        with _explained(f"the upload to {repository} failed", UploadError, f"; {again}"):
            files = _files(folder, repository)
            size = sum(file.upload_info.size for file in files)
            print(f"Uploading {len(files)} files, {size / 2**20:,.1f} MiB, to {repository}", file=sys.stderr)
            if not destination.create_pr:
                api.create_repo(repository, private=destination.private or None, exist_ok=True)
                if destination.revision and not _is_pull_request(destination.revision):
                    api.create_branch(repository, branch=destination.revision, exist_ok=True)
            made = api.create_commit(
                repository,
                files,
                commit_message=f"Upload a model converted with hf-topk {version('hf-topk')}",
                revision=destination.revision,
                create_pr=destination.create_pr,
            )
    except KeyboardInterrupt as interrupt:
        error = UploadError(f"the upload to {repository} was interrupted; {again}")
        error.exit_code = INTERRUPTED
        raise error from interrupt
    return Uploaded(repository, made.oid, made.pr_url or made.commit_url)


def _api() -> HfApi:
    return HfApi(library_name="hf-topk", library_version=version("hf-topk"))


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"there is no {folder / 'config.json'}: give the folder that `hf-topk convert` wrote")
    found = read_json(folder / "config.json").get("model_type")
    if found != TopKExpertsConfig.model_type:
        raise InputError(
            f"{folder} is a dense model ('{found}'), not a converted one: convert it with `hf-topk convert MODEL OUT`"
        )
    open_source(str(folder), folder)


def _answer(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The server's answer to a call; None if it does not implement it."""
    try:
        return call(*args, **kwargs)
    except RepositoryNotFoundError:
        raise
    except HfHubHTTPError as error:
        if error.response.status_code in NOT_IMPLEMENTED:
            return None
        raise


def _role(user: dict[str, Any]) -> str | None:
    """The role of a user's token; None if the Hub does not tell."""
    return user.get("auth", {}).get("accessToken", {}).get("role")


def _check_repository(destination: Destination, user: dict[str, Any]) -> None:
    name, api = destination.repository, _api()
    pull_request = destination.revision if _is_pull_request(destination.revision) else None
    is_proposed = destination.create_pr or pull_request is not None
    try:
        found = api.repo_info(name, revision=pull_request)
    except HfHubHTTPError as error:
        is_absent = isinstance(error, RepositoryNotFoundError) or error.response.status_code == NOT_FOUND
        if is_proposed or isinstance(error, GatedRepoError) or not is_absent:
            raise
        _check_owner(name, user)
        return
    if destination.private and found.private is False:
        raise InputError(
            f"{name} exists and is public: make it private at {constants.ENDPOINT}/{name}/settings, choose another "
            "name, or leave out --private"
        )
    if not is_proposed:
        _answer(api.auth_check, name, write=True)


def _is_pull_request(revision: str | None) -> bool:
    """Whether a revision is an existing pull request; its author may write to it."""
    return revision is not None and revision.startswith("refs/")


def _check_owner(name: str, user: dict[str, Any]) -> None:
    """Refuse a new repository of an owner for whom the user cannot create one."""
    if _role(user) not in MAY_WRITE:
        return
    owner, _, rest = name.partition("/")
    if owner not in (user["name"], *(organization["name"] for organization in user.get("orgs", []))):
        raise InputError(
            f"{user['name']} cannot create a repository for {owner}: push to {user['name']}/{rest}, or log in as "
            "another user with `hf auth login`"
        )


def _files(folder: Path, repository: str) -> list[CommitOperationAdd]:
    """The files to upload: all but hidden files, such as caches and work folders, byte code and the HTML report."""
    files = []
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        is_left_out = any(part.startswith(".") or part in CACHES for part in place.parts) or place == Path(REPORT_FILE)
        if path.is_file() and not is_left_out:
            content = _for_the_hub(path, repository) if place.parent == Path() else None
            files.append(CommitOperationAdd(place.as_posix(), content or str(path.absolute())))
    return files


def _for_the_hub(path: Path, repository: str) -> bytes | None:
    """The content to upload where it differs from the file: without local names, and quotes of the calibration text."""
    if path.name == CARD_FILE:
        return named(path.read_text(encoding="utf-8"), repository).encode()
    if path.name == RECIPE_FILE:
        with suppress(yaml.YAMLError, KeyError, TypeError):  # another file of that name
            choices = yaml.safe_load(path.read_text(encoding="utf-8"))
            return yaml.safe_dump({**choices, "text": public_name(choices["text"])}, sort_keys=False).encode()
    if path.name == OBSERVATIONS_FILE:
        with suppress(ValueError, TypeError, KeyError):
            return Observations.from_json(path.read_text(encoding="utf-8")).without_text().to_json().encode()
    return None


def _command(folder: Path, destination: Destination) -> str:
    """The command that uploads a folder."""
    options = ["--private"] if destination.private else []
    options += ["--revision", destination.revision] if destination.revision else []
    options += ["--create-pr"] if destination.create_pr else []
    return shlex.join(["hf-topk", "push", str(folder), destination.repository, *options])


@contextmanager
def _explained(what: str, kind: type[TopKExpertsError], ending: str = "") -> Iterator[None]:
    """Raise the client's errors as one-line errors of the given class."""
    try:
        yield
    except TopKExpertsError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise kind(f"{what}: {_reason(error)}{ending}") from error


def _reason(error: BaseException) -> str:
    """The cause of an error, and the way out."""
    while not isinstance(error, HTTPError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return f"you are not logged in: run `hf auth login`, or set HF_TOKEN ({constants.ENDPOINT}/settings/tokens)"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = f" ({one_line(error.server_message)})" if error.server_message else ""
        is_passing = status == TOO_MANY_REQUESTS or status >= SERVER_ERROR
        way_out = WAYS_OUT.get(status, "wait a while, and try again" if is_passing else "check the names")
        return f"the Hub answered {status}{said}: {way_out}"
    if isinstance(error, HTTPError):
        kind = type(error).__name__  # not the message, which may contain headers with the token
        return f"{constants.ENDPOINT} cannot be reached ({kind}): check the network, HF_ENDPOINT and HF_TOKEN"
    return one_line(error)
