"""Pipelines on the Hugging Face hub: files by name, from one commit, of the first repository that has them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from dreamfusion_fast.errors import UserError, one_line
from dreamfusion_fast.guidance.config import GuidanceConfig
from dreamfusion_fast.guidance.models.pipeline_source import EXPECTED, PipelineSource

_log = logging.getLogger(__name__)

_LOG_IN = "log in with: hf auth login"


class HubError(UserError):
    """A file of the hub that cannot be had here and now.

    Attributes:
        unreachable: for want of the hub, which may have it.
    """

    def __init__(self, text: str, unreachable: bool = False):
        super().__init__(one_line(text, 1000))
        self.unreachable = unreachable


class HubSource(PipelineSource):
    """A pipeline on the hub, or in the hub's cache on this machine.

    Repositories are taken down now and then. Of several that hold the same pipeline the first one that is there is
    taken, also from the cache. The `revision` then names it as well: "owner/name@commit".

    Args:
        hub_ids: the repositories, best first.
        config: its revision and variant are followed.

    Raises:
        UserError: none of them can be had; the message says what can be done.
    """

    def __init__(self, hub_ids: Sequence[str], config: GuidanceConfig):
        self._mirrored = len(hub_ids) > 1
        self._commit = config.revision
        if self._mirrored and self._commit is not None and "@" in self._commit:
            hub_id, _, self._commit = self._commit.partition("@")
            if hub_id not in hub_ids:
                raise UserError(
                    f"guidance revision {config.revision!r} is not of {config.name!r}, which is {' or '.join(hub_ids)}"
                )
            hub_ids = [hub_id]
        if self._commit is not None and not re.fullmatch(r"\w[\w-]*([./]\w[\w-]*)*", self._commit):
            raise UserError(f"guidance revision {config.revision!r} is no branch, tag or commit of {hub_ids[0]!r}")
        self._hub_ids = hub_ids
        self._hub_id = hub_ids[0]
        self._listing: list[str] | None = None
        super().__init__(hub_ids[0], config)

    def _find(self) -> None:
        """See `PipelineSource._find`: the repository and the commit from which everything is taken."""
        errors: list[HubError] = []
        for hub_id in self._hub_ids:
            try:
                index = hub_file(hub_id, self.index_file, self._commit)
            except HubError as error:
                errors.append(error)
                continue
            self._hub_id = self.name = hub_id
            # The cached file lies in a folder named after the commit.
            self._snapshot = index.parent
            self._commit = self._snapshot.name
            self.revision = f"{hub_id}@{self._commit}" if self._mirrored else self._commit
            if errors:
                _log.warning(one_line(f"guidance is taken from {hub_id}, since {errors[0]}"))
            return
        # Another one that is there but cannot be reached matters more than one that is gone.
        fault = next((fault for fault in errors if fault.unreachable), errors[0])
        others = f"; nor could its mirrors be had: {', '.join(self._hub_ids[1:])}" if len(errors) > 1 else ""
        raise UserError(f"{fault}{others}") from fault

    def _file(self, relative: str) -> Path:
        return hub_file(self._hub_id, self._place(relative), self._commit)

    def _files_in(self, component: str) -> list[str] | None:
        if self._listing is None:
            import huggingface_hub

            try:
                self._listing = list(huggingface_hub.list_repo_files(self._hub_id, revision=self._commit))
            except Exception:  # not reachable now: the files may all be in the cache, and loading them will tell
                self._listing = []
        if not self._listing:
            return None
        component = self._place(component)
        folder = f"{component}/" if component else ""
        names = [name.removeprefix(folder) for name in self._listing if name.startswith(folder)]
        return [name for name in names if "/" not in name]

    def _names(self, component: str) -> list[str]:
        """See `PipelineSource._names`: what is in the cache, where the hub cannot be asked."""
        names = self._files_in(component)
        return (
            names if names is not None else [path.name for path in (self._snapshot / self._place(component)).glob("*")]
        )

    def _identity(self, components: list[str]) -> str:
        return f"{self._hub_id}@{self._commit}:{','.join(components)}"


def hub_file(hub_id: str, relative: str, revision: str | None) -> Path:
    """A small file of a repository, in the hub's cache on this machine.

    Raises:
        HubError: it cannot be had; the message says why, and what can be done.
    """
    import huggingface_hub
    from huggingface_hub import errors

    name = f"guidance {hub_id!r}"
    try:
        return Path(huggingface_hub.hf_hub_download(hub_id, relative, revision=revision))
    except errors.RepositoryNotFoundError as error:
        # Not there, or not for us. What was downloaded before that may still be used.
        cached = huggingface_hub.try_to_load_from_cache(hub_id, relative, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        if isinstance(error, errors.GatedRepoError):
            raise HubError(
                f"{name} asks for its licence to be accepted: do so at https://huggingface.co/{hub_id} and {_LOG_IN}"
            ) from error
        raise HubError(
            f"{name} is neither a folder here nor a model on the hub: it is misspelt, was deleted, or is private, in "
            f"which case {_LOG_IN}; {EXPECTED}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{name} has no revision {revision!r} on the hub") from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(name) from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{name}: no diffusers pipeline, it lacks {relative}: {EXPECTED}") from error
    except Exception as error:  # the hub's HTTP library differs between versions, and so do its errors
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise HubError(
                f"{name}: the hub refuses {relative} ({status}); a token that may read it is wanted: {_LOG_IN}"
            ) from error
        raise _unreachable(name, f" ({one_line(error)})") from error


def _unreachable(name: str, why: str = "") -> HubError:
    from huggingface_hub import constants

    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    remedy = "unset it" if constants.HF_HUB_OFFLINE else "check the network"
    return HubError(
        f"{name} is not a folder here, not in the cache, and {reason}: {remedy}, name a folder that holds a diffusers "
        f"pipeline, or use guidance embedded{why}",
        unreachable=True,
    )
