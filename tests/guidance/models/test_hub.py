"""Pipelines on the hub, by fakes of huggingface_hub's calls: mirrors, what is asked of it, and what its errors say."""

from __future__ import annotations

import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import KNOWN_GUIDANCE, GuidanceConfig, create_guidance

pytest.importorskip("diffusers")

Pipelines = Callable[..., Path]
MIRRORS = KNOWN_GUIDANCE["stable-diffusion"]


def _refused(name: str | Path, message: str, **options: Any) -> str:
    with pytest.raises(UserError, match=message) as caught:
        create_guidance(GuidanceConfig(name=str(name), **options))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", [name for name, hub_ids in KNOWN_GUIDANCE.items() if hub_ids])
def test_known_names_ask_the_hub_for_what_they_stand_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def fail(hub_id: str, *_: Any, **__: Any) -> str:
        raise errors.LocalEntryNotFoundError(hub_id)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    _refused(name, f"guidance '{KNOWN_GUIDANCE[name][0]}' is not a folder here, .*and the hub cannot be reached")


def _hub_error(kind: str) -> Exception:
    from huggingface_hub import errors

    return {
        "unreachable": lambda: errors.LocalEntryNotFoundError("no"),
        "offline": lambda: errors.OfflineModeIsEnabled("offline"),
        "network": lambda: OSError("no route to host\nsecond line"),
        "absent": lambda: _without_init(errors.RepositoryNotFoundError),
        "gated": lambda: _without_init(errors.GatedRepoError),
        "revision": lambda: _without_init(errors.RevisionNotFoundError),
        "entry": lambda: _without_init(errors.EntryNotFoundError),
        "forbidden": lambda: _with_status(errors.HfHubHTTPError, 403),
    }[kind]()


def _without_init(kind: type[Exception]) -> Exception:
    """These want a response of an HTTP library that differs between versions."""
    return kind.__new__(kind)


def _with_status(kind: type[Exception], status: int) -> Exception:
    error: Any = _without_init(kind)
    error.response = types.SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("unreachable", "hub cannot be reached"),
        ("offline", "hub cannot be reached"),
        ("network", "hub cannot be reached.*no route to host"),
        (
            "absent",
            "neither a folder here nor a model on the hub: it is misspelt, was deleted, .*hf auth",
        ),
        ("forbidden", "the hub refuses model_index.json .403.; a token that may read it is wanted"),
        ("gated", "licence to be accepted.*huggingface.co/owner/name"),
        ("revision", "has no revision 'v7'"),
        ("entry", "lacks model_index.json"),
    ],
)
def test_hub_errors(monkeypatch: pytest.MonkeyPatch, kind: str, message: str) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> str:
        raise _hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    _refused("owner/name", message, revision="v7")


@pytest.mark.parametrize("name", ["stable-diffusion", "owner/name"])
def test_hub_id_is_pinned_to_one_commit(
    pipeline: Pipelines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import huggingface_hub

    snapshot = Path(shutil.copytree(pipeline("latent"), tmp_path / "snapshots" / "0123abc"))
    asked: list[tuple[str, str | None]] = []

    def download(hub_id: str, relative: str, revision: str | None = None) -> str:
        asked.append((hub_id, revision))
        return str(snapshot / relative)

    def unreachable(hub_id: str, revision: str | None = None) -> list[str]:
        raise OSError("the listing is not in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
    guidance = create_guidance(GuidanceConfig(name=name, revision="main"))
    assert guidance.image_size == 16
    wanted = KNOWN_GUIDANCE.get(name, (name,))[0]
    assert asked[0] == (wanted, "main")
    assert asked[-1] == (wanted, "0123abc")
    assert f"{wanted}@0123abc" in guidance.model.text_identity


def test_weights_on_the_hub_are_looked_for_before_anything_is_downloaded(
    pipeline: Pipelines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = Path(shutil.copytree(pipeline("latent"), tmp_path / "snapshots" / "0123abc"))
    files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
    asked: list[tuple[str, str | None]] = []

    def listing(hub_id: str, revision: str | None = None) -> list[str]:
        asked.append((hub_id, revision))
        return files

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda hub_id, relative, revision: snapshot / relative)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", listing)
    create_guidance(GuidanceConfig(name="owner/name"))
    assert asked == [("owner/name", "0123abc")]
    files = [name.replace("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin") for name in files]
    _refused("owner/name", "weights of unet are stored as pickles")
    files = [name for name in files if not name.endswith(".bin")]
    _refused("owner/name", "unet holds no weights")


class FakeHub:
    """Repositories by id: a folder that is there, or the kind of the error that asking for one raises."""

    def __init__(self, patch: pytest.MonkeyPatch, held: dict[str, Path | str]):
        import huggingface_hub

        self.held, self.asked, self.cached = held, [], {}  # type: ignore[var-annotated]
        patch.setattr(huggingface_hub, "hf_hub_download", self.download)
        patch.setattr(huggingface_hub, "list_repo_files", self.listing)
        patch.setattr(huggingface_hub, "try_to_load_from_cache", self.cache)

    def download(self, hub_id: str, relative: str, revision: str | None = None) -> str:
        self.asked.append((hub_id, revision))
        found = self.held.get(hub_id, "absent")
        if isinstance(found, str):
            raise _hub_error(found)
        if revision not in (None, found.name):
            raise _hub_error("revision")
        return str(found / relative)

    def cache(self, hub_id: str, relative: str, revision: str | None = None) -> str | None:
        return str(self.cached[hub_id] / relative) if hub_id in self.cached else None

    def listing(self, hub_id: str, revision: str | None = None) -> list[str]:
        raise OSError("no listing")


@pytest.fixture
def snapshot(pipeline: Pipelines, tmp_path: Path) -> Callable[[str], Path]:
    return lambda commit: Path(shutil.copytree(pipeline("latent"), tmp_path / commit))


@pytest.mark.parametrize("first", ["absent", "gated", "unreachable", "revision", "forbidden"])
def test_the_first_mirror_that_can_be_had_is_taken(
    monkeypatch: pytest.MonkeyPatch, snapshot: Callable[[str], Path], first: str, said: Callable[[], list[str]]
) -> None:
    hub = FakeHub(monkeypatch, {MIRRORS[0]: first, MIRRORS[1]: snapshot("0123abc")})
    model = create_guidance(GuidanceConfig(name="stable-diffusion", cache=False)).model
    assert (model.name, model.revision) == (MIRRORS[1], f"{MIRRORS[1]}@0123abc")
    assert f"{MIRRORS[1]}@0123abc" in model.text_identity
    model.load()
    assert {hub_id for hub_id, _ in hub.asked} == set(MIRRORS[:2])
    assert all(commit == "0123abc" for hub_id, commit in hub.asked[2:])
    assert any(f"taken from {MIRRORS[1]}" in line for line in said())


def test_a_run_goes_on_with_the_mirror_that_it_began_with(
    monkeypatch: pytest.MonkeyPatch, snapshot: Callable[[str], Path]
) -> None:
    hub = FakeHub(monkeypatch, {MIRRORS[0]: snapshot("1111aaa"), MIRRORS[1]: snapshot("0123abc")})
    config = GuidanceConfig(name="stable-diffusion", revision=f"{MIRRORS[1]}@0123abc")
    model = create_guidance(config).model
    assert model.revision == f"{MIRRORS[1]}@0123abc"
    assert {hub_id for hub_id, _ in hub.asked} == {MIRRORS[1]}
    # One that was saved before there were mirrors is a commit alone.
    assert create_guidance(GuidanceConfig(name="stable-diffusion", revision="1111aaa")).model.name == MIRRORS[0]
    _refused("stable-diffusion", "is not of 'stable-diffusion', which is", revision="owner/evil@0123abc")
    _refused("stable-diffusion", "is no branch, tag or commit", revision=f"{MIRRORS[1]}@../..")


def test_no_mirror_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeHub(monkeypatch, {})
    text = _refused("stable-diffusion", f"guidance '{MIRRORS[0]}' is neither a folder here nor a model on the hub")
    assert all(mirror in text for mirror in MIRRORS)
    FakeHub(monkeypatch, {MIRRORS[1]: "unreachable"})
    _refused("stable-diffusion", f"guidance '{MIRRORS[1]}' is not a folder here, .* the hub cannot be reached")


@pytest.mark.parametrize("kind", ["absent", "gated"])
def test_what_was_downloaded_before_it_was_taken_down_still_serves(
    monkeypatch: pytest.MonkeyPatch, snapshot: Callable[[str], Path], kind: str
) -> None:
    hub = FakeHub(monkeypatch, dict.fromkeys(MIRRORS, kind))
    hub.cached = {MIRRORS[-1]: snapshot("0123abc")}
    model = create_guidance(GuidanceConfig(name="stable-diffusion", cache=False)).model
    model.load()
    assert model.revision == f"{MIRRORS[-1]}@0123abc"


def test_the_hub_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    FakeHub(monkeypatch, {"owner/name": "offline"})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _refused("owner/name", "not in the cache, and HF_HUB_OFFLINE is set: unset it, name a folder")
