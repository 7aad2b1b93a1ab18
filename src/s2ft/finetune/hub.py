"""A result on the Hub: may it be uploaded under its name, asked before the run; and the upload, after it.

    --push-to-hub me/math-adapter    the output but for checkpoints, in a repository that is made if it is not there

A new repository is public, unless the organisation says otherwise; one that is there stays as it is, so make it beforehand to
have it private.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from s2ft.common.errors import S2FTError, first_line

LEFT_OUT = ["checkpoint-*", ".*"]


def check_push(name: str | None) -> None:
    """Raises `S2FTError` unless a result may be uploaded as `name`: a good name, a login, and a place of one's own."""
    if name is None:
        return
    given = f"push_to_hub={name!r}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise S2FTError(f"{given}: {first_line(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise S2FTError(f"{given}: HF_HUB_OFFLINE is set, so nothing is uploaded")
    try:
        me = HfApi().whoami()
    except Exception as error:  # no token, a wrong one, no connection: the Hub's errors and httpx's
        raise S2FTError(f"{given} needs a login (`hf auth login`, or HF_TOKEN): {first_line(error)}") from None
    places = [me["name"], *(one["name"] for one in me.get("orgs", []))]
    if "/" in name and name.partition("/")[0] not in places:
        raise S2FTError(f"{given} is not yours to write to; your login may write to {', '.join(places)}")


def push(folder: Path, name: str) -> str:
    """Uploads a result; its address.

    Raises:
        S2FTError: if that fails; the result stays where it is.
    """
    api = HfApi()
    try:
        repository = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, ignore_patterns=LEFT_OUT, commit_message="s2ft train"
        )
    except Exception as error:
        again = f"upload it by `hf upload {name} {folder}`"
        raise S2FTError(
            f"push_to_hub={name!r} failed: {first_line(error)}; the result is in {str(folder)!r}: {again}"
        ) from error
    return str(repository)
