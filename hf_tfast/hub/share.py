"""A model with its tokenizer, its code and its card: into a new folder, or to the Hub.

save(model, "fast", tokenizer=tokenizer, license="apache-2.0", base_model="user/dense")
push(model, "user/fast", tokenizer=tokenizer, license="apache-2.0", base_model="user/dense", results=["runs/..."])
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import EntryNotFoundError
from transformers import PreTrainedModel

from ..benchmarking.folder import new_folder
from .card import MADE_BY, model_card
from .remote import is_ours, save_code

__all__ = ["push", "save"]


def save(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    name: str | None = None,
    tokenizer: Any = None,
    results: Sequence[str | Path] = (),
    remote_code: bool = False,
    **metadata: Any,
) -> Path:
    """Everything that a repository of this model holds, in a new folder that appears whole or not at all.

    name         what the card calls the model; the folder's name when not given.
    tokenizer    tokenizer or processor to save with it.
    results, remote_code, metadata   as in `model_card`; remote_code also writes the code (TFast models only).

    FileExistsError where the folder exists; ValueError as `model_card` and `save_code`.
    """
    folder = Path(folder)
    card = model_card(model, name or folder.name, results=results, remote_code=remote_code, **metadata)
    with new_folder(folder, mark="config.json") as working:
        model.save_pretrained(working)
        if tokenizer is not None:
            tokenizer.save_pretrained(working)
        if remote_code or is_ours(model):
            save_code(model, working, standalone=remote_code)
        card.save(working / "README.md")
    return folder


def push(
    model: PreTrainedModel,
    repo_id: str,
    *,
    tokenizer: Any = None,
    results: Sequence[str | Path] = (),
    remote_code: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
    **metadata: Any,
) -> str:
    """`save` to the Hub; returns the address of the commit. A repository that exists gets a new commit, but a card
    that somebody wrote by hand is not replaced: ValueError, before anything is uploaded."""
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as place:
        options: dict[str, Any] = {"name": repo_id, "tokenizer": tokenizer, "remote_code": remote_code}
        folder = save(model, Path(place) / "model", results=results, **options, **metadata)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        _check_card(api, repository)
        said = f"Upload {type(model).__name__}"
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=said).commit_url)


def _check_card(api: HfApi, repository: str) -> None:
    try:
        found = Path(api.hf_hub_download(repository, "README.md", force_download=True)).read_text(encoding="utf-8")
    except EntryNotFoundError:
        return
    if MADE_BY not in found:
        raise ValueError(
            f"{repository} has a card that hf_tfast did not make, and it is left as it is: move it away, or push "
            "with model.push_to_hub, which keeps it"
        )
