"""How TFast models are saved and pushed, with the code that others need to load them.

A process that has imported hf_tfast needs no code from a repository: the installed classes win. For others there are
two kinds of `modeling_tfast.py`:

    push_to_hub(...)                     a pointer: says `pip install hf_tfast` where it is missing, else loads it
    save_pretrained, push_to_hub(..., remote_code=True)    the whole model in one file, on torch and Transformers alone
"""

import json
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

__all__ = ["SharedModel"]

_PUSHED: ContextVar[bool | None] = ContextVar("_PUSHED", default=None)  # within push_to_hub: its remote_code


class SharedModel(PreTrainedModel):
    """Adds `remote_code` to `save_pretrained` and `push_to_hub`."""

    def save_pretrained(self, save_directory: Any, *args: Any, remote_code: bool | None = None, **kwargs: Any) -> None:
        """As in Transformers. `remote_code` True adds `modeling_tfast.py`, with which the folder loads without
        hf_tfast by trust_remote_code=True; it replaces an older one. False or None: no code, none is asked for."""
        if kwargs.pop("push_to_hub", False):
            named = {name: kwargs.pop(name) for name in _OF_PUSH if name in kwargs}
            self.save_pretrained(save_directory, *args, remote_code=remote_code, **kwargs)
            shards = {"max_shard_size": kwargs["max_shard_size"]} if "max_shard_size" in kwargs else {}
            name = named.pop("repo_id", Path(save_directory).name)
            self.push_to_hub(name, remote_code=bool(remote_code), **named, **shards)
            return
        super().save_pretrained(save_directory, *args, **kwargs)
        if not (args[0] if args else kwargs.get("is_main_process", True)):
            return
        copied = self.is_remote_code()  # a class from a repository: Transformers has copied its file
        if not copied:
            _leave_out_code(Path(save_directory) / "config.json")
        pushed = _PUSHED.get()
        if remote_code or pushed or (pushed is not None and not copied):
            import hf_tfast  # the public door: what it needs stands on this room

            hf_tfast.save_code(self, save_directory, standalone=bool(remote_code or pushed))  # type: ignore[misc]

    def push_to_hub(  # type: ignore[override]
        self, repo_id: str, *, remote_code: bool = False, **options: Any
    ) -> str:
        """As in Transformers, with code. `remote_code` True: all of it, so that hf_tfast need not be installed; False:
        a pointer to hf_tfast."""
        token = _PUSHED.set(remote_code)
        try:
            return super().push_to_hub(repo_id, **options)  # type: ignore[arg-type]
        finally:
            _PUSHED.reset(token)


_OF_PUSH = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


def _leave_out_code(config: Path) -> None:
    """A model that came with code was loaded without it; its config must not ask for a file that is not saved."""
    if not config.is_file():
        return
    content = json.loads(config.read_text(encoding="utf-8"))
    if content.pop("auto_map", None) is not None:
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
