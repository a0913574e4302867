"""Hostile pipelines, made of whole ones by rules: an error of one line, or all is well, and nothing else happens.

DREAMFUSION_FAST_LONG_TESTS=1 tries more of them, other ones each time.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from forms import LONG
from safetensors.torch import load_file, save_file
from watching import TooLongError, watched

from dreamfusion_fast.errors import UserError
from dreamfusion_fast.guidance import GuidanceConfig, Views, create_guidance
from dreamfusion_fast.guidance.config import KNOWN_GUIDANCE

pytest.importorskip("diffusers")

Pipelines = Callable[..., Path]
KINDS = ["latent", "sdxl", "pixel", "sd3", "flux"]
SAMPLE = 100 if LONG else 6  # of each kind's changed values

EVIL = 'import pathlib\npathlib.Path(__file__).with_name("marker").touch()\nclass Evil:\n    pass\n'
VALUES: list[Any] = [
    *(None, True, -1, 0, 3, 10**5, 10**7, 10**30, 1e308, float("nan")),
    *("", "../outside", "\x1b[2J\n", "evil.Evil", "a" * 10**5),
    *([], {}, [8], [None, "a"], [1] * 1000, {"auto_map": {"": "evil--evil.Evil"}}),
    json.loads("[" * 60 + "]" * 60),
]


def _json_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.json") if path.name not in ("vocab.json", "tokenizer.json"))


def _places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys that lead to each value of a tree, the innermost last."""
    if here:
        yield here
    for key, below in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(below, (*here, key))


def _replaced(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    tree = copy.deepcopy(tree)
    inner = tree
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return tree


def _use(folder: Path, options: dict[str, Any]) -> None:
    """All that a run does with a pipeline."""
    settings = {"name": str(folder), "dtype": "float32", "cache": False, **options}
    guidance: Any = create_guidance(GuidanceConfig(**settings))
    embeddings = guidance.embed("a chair")
    guidance.load()
    model, views = guidance.model, Views(torch.zeros(1), torch.zeros(1))
    with torch.no_grad():
        noisy = torch.randn_like(model.encode(torch.zeros(1, 3, 8, 8)))
        model.predict(noisy, torch.zeros(1, dtype=torch.int64), embeddings.select(("null", "text"), views), views)


def _attempt(
    folder: Path, *also: Path, seconds: int = 10, options: Mapping[str, Any] = MappingProxyType({})
) -> str | None:
    """The message of the error by which the pipeline was refused, or None; whatever else it did fails the test."""
    message = None
    with watched(folder, *also, seconds=seconds) as done:
        try:
            _use(folder, dict(options))
        except UserError as error:
            message = str(error)
    assert not done
    assert not list(folder.rglob("marker")), "code of the pipeline was run"
    if message is not None:
        assert message.isprintable()
        assert len(message) < 1500
    return message


def _refused(folder: Path) -> str:
    message = _attempt(folder)
    assert message is not None
    return message


def _edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def hostile(own_pipeline: Pipelines, tmp_path: Path) -> Pipelines:
    """A whole pipeline with code of its own in every folder, and another pipeline beside it that it must not read."""

    def get(kind: str) -> Path:
        folder = own_pipeline(kind)
        shutil.copytree(folder, tmp_path / "outside")
        for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            (place / "evil.py").write_text(EVIL)
        return folder

    return get


def test_what_libraries_in_rust_open_is_seen(tmp_path: Path) -> None:
    for name in ("ours", "outside"):
        (tmp_path / name).mkdir()
        save_file({"a": torch.zeros(3)}, tmp_path / name / "a.safetensors")
    with watched(tmp_path / "ours") as done:
        load_file(tmp_path / "ours" / "a.safetensors")
    assert not done
    with watched(tmp_path / "ours") as done:
        load_file(tmp_path / "outside" / "a.safetensors")
    assert set(done) == {f"open {tmp_path.resolve()}/outside/a.safetensors"}


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_pipeline_is_served(hostile: Pipelines, kind: str) -> None:
    assert _attempt(hostile(kind), seconds=60) is None


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", KINDS)
def test_any_value_may_be_any_other(hostile: Pipelines, kind: str) -> None:
    folder = hostile(kind)
    cases = [
        (path, place, value)
        for path in _json_files(folder)
        for place in _places(json.loads(path.read_text()))
        for value in VALUES
    ]
    assert len(cases) > 1000
    _attempt(folder, seconds=60)  # imports take time
    faults = []
    for path, place, value in random.Random(None if LONG else 1).sample(cases, SAMPLE):
        before = path.read_text()
        path.write_text(json.dumps(_replaced(json.loads(before), place, value)))
        try:
            _attempt(folder)
        except (Exception, TooLongError) as error:
            faults.append(
                f"{path.relative_to(folder)} {place} {str(value)[:40]!r}: {type(error).__name__} {error}"[:300]
            )
        path.write_text(before)
    assert not faults, "\n".join(faults)


@pytest.mark.quick(4)
@pytest.mark.parametrize(
    ("relative", "fields"),
    [
        ("vae/config.json", {"block_out_channels": 8}),
        ("unet/config.json", {"layers_per_block": 10**6}),
        ("unet/config.json", {"layers_per_block": 10**7}),
        ("unet/config.json", {"transformer_layers_per_block": 10**6}),
        ("unet/config.json", {"freq_shift": "a"}),
        ("unet/config.json", {"block_out_channels": [10**5, 10**6]}),
        ("vae/config.json", {"layers_per_block": 10**6}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**6}),
        ("text_encoder/config.json", {"max_position_embeddings": None}),
        ("text_encoder/config.json", {"max_position_embeddings": 1}),
        ("text_encoder/config.json", {"vocab_size": 10**6}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**6}),
        ("scheduler/scheduler_config.json", {"beta_end": 1e9}),
        ("model_index.json", {"_class_name": ["evil", "Evil"]}),
    ],
)
def test_values_that_no_model_has(hostile: Pipelines, relative: str, fields: dict[str, Any]) -> None:
    folder = hostile("latent")
    _edit(folder / relative, **fields)
    _refused(folder)


@pytest.mark.quick(4)
@pytest.mark.parametrize(
    ("kind", "relative", "fields"),
    [
        ("sd3", "transformer/config.json", {"pos_embed_max_size": 10**5}),
        ("sd3", "transformer/config.json", {"pos_embed_max_size": 0}),
        ("sd3", "transformer/config.json", {"num_layers": 10**6}),
        ("sd3", "transformer/config.json", {"dual_attention_layers": 3}),
        ("sd3", "transformer/config.json", {"patch_size": 3}),
        ("sd3", "transformer/config.json", {"qk_norm": "evil"}),
        ("sd3", "transformer/config.json", {"num_attention_heads": 10**5, "attention_head_dim": 10**5}),
        ("sd3", "text_encoder_3/config.json", {"num_layers": 10**6}),
        ("sd3", "scheduler/scheduler_config.json", {"num_train_timesteps": 10**6}),
        ("sd3", "scheduler/scheduler_config.json", {"shift": 1e308}),
        ("sd3", "scheduler/scheduler_config.json", {"invert_sigmas": True}),
        ("flux", "transformer/config.json", {"num_single_layers": 10**6}),
        ("flux", "transformer/config.json", {"axes_dims_rope": [10**5, 10**5, 10**5]}),
        ("flux", "transformer/config.json", {"axes_dims_rope": [2, 2]}),
        ("flux", "transformer/config.json", {"sample_size": 10**6}),
        ("flux", "scheduler/scheduler_config.json", {"max_image_seq_len": 8}),
        ("flux", "scheduler/scheduler_config.json", {"max_shift": 1e9}),
        ("flux", "scheduler/scheduler_config.json", {"time_shift_type": "evil"}),
    ],
)
def test_values_that_no_flow_has(hostile: Pipelines, kind: str, relative: str, fields: dict[str, Any]) -> None:
    folder = hostile(kind)
    _edit(folder / relative, **fields)
    _refused(folder)


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["latent", "sdxl", "sd3", "flux"])
def test_no_other_class_is_taken(hostile: Pipelines, kind: str) -> None:
    folder = hostile(kind)
    index = json.loads((folder / "model_index.json").read_text())
    components = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] and name != "scheduler"]
    classes = [
        *(
            ["evil", "Evil"],
            ["evil.evil", "Evil"],
            ["os", "system"],
            ["builtins", "eval"],
            ["diffusers_modules", "Evil"],
        ),
        *(
            ["diffusers", name]
            for name in ("DiffusionPipeline", "AutoModel", "ModelMixin", "models", "UNet3DConditionModel")
        ),
        *(["transformers", name] for name in ("AutoTokenizer", "AutoModel", "pipeline", "CLIPModel", "GPT2Tokenizer")),
        *(
            ["transformers", 5],
            ["transformers", ["CLIPTokenizer"]],
            [["transformers"], "CLIPTokenizer"],
            "CLIPTokenizer",
        ),
    ]
    for component in components:
        for wrong in [*classes, *(index[other] for other in components if index[other][0] != index[component][0])]:
            _edit(folder / "model_index.json", **{**index, component: wrong})
            assert component in _refused(folder)
    for component in components:  # models as tokenizers, and the other way round
        text = next(name for name in components if name.startswith("text" if component.startswith("tok") else "tok"))
        _edit(folder / "model_index.json", **{**index, component: index[text]})
        assert component in _refused(folder)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_an_index_names_safetensors_of_its_folder(hostile: Pipelines, component: str) -> None:
    folder = hostile("latent")
    (weights,) = (folder / component).glob("*.safetensors")
    tensors = load_file(weights)
    outside = folder.parent / "outside" / component / weights.name
    pickled = weights.with_name("weights.bin")
    torch.save(tensors, pickled)
    weights.rename(weights.with_name("decoy.safetensors"))
    (folder / component / "below").mkdir()
    shutil.copy(outside, folder / component / "below")
    index = weights.with_name(f"{weights.name}.index.json")

    def name(file: Any) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file)}))

    name("decoy.safetensors")
    assert _attempt(folder, seconds=60) is None
    wrong = [f"../../outside/{component}/{weights.name}", str(outside), f"below/{weights.name}", pickled.name]
    for file in [*wrong, "evil.py", "..", "", "\0.safetensors", "a" * 5000 + ".safetensors", 5, None, [], {}]:
        name(file)
        assert component in _refused(folder)
    for content in [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": None}]:
        index.write_text(json.dumps(content))
        assert component in _refused(folder)


@pytest.mark.parametrize("relative", ["unet", "text_encoder"])
def test_pickles_are_not_read(hostile: Pipelines, relative: str) -> None:
    folder = hostile("latent")
    (weights,) = (folder / relative).glob("*.safetensors")
    tensors = load_file(weights)
    for stem in ("pytorch_model", "diffusion_pytorch_model", "model"):
        torch.save(tensors, weights.with_name(f"{stem}.bin"))
    torch.save(tensors, folder / "tokenizer" / "pytorch_model.bin")
    assert _attempt(folder, seconds=60) is None
    weights.unlink()
    assert "stored as pickles" in _refused(folder)


CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"a": [1, ',
    "null": b"null",
    "list": b"[1]",
    "deep list": b"[" * 100_000,
    "deep": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "a little deep": b'{"a":' * 100 + b"1" + b"}" * 100,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "large": b'{"a": "' + b"a" * 2**25 + b'"}',
    "no text": b"\xff\xfe\x00\x80",
    "a bell": b'{"\x07": "\x07"}',
}


@pytest.mark.quick(3)
@pytest.mark.parametrize("content", CONTENTS)
def test_files_that_hold_something_else(hostile: Pipelines, content: str) -> None:
    folder = hostile("latent")
    paths = [*_json_files(folder), folder / "tokenizer" / "vocab.json", folder / "tokenizer" / "merges.txt"]
    for path in paths if LONG else random.Random(content).sample(paths, 4):
        before = path.read_bytes()
        path.write_bytes(CONTENTS[content])
        message = _attempt(folder, seconds=30)
        needed = path.name in ("model_index.json", "config.json", "scheduler_config.json")
        assert message is not None or not needed, path
        path.write_bytes(before)


@pytest.mark.quick(1)
@pytest.mark.parametrize("what", ["link out", "loop", "pipe", "folder", "dangling"])
def test_files_that_are_none(hostile: Pipelines, what: str) -> None:
    folder = hostile("latent")
    paths = [*folder.glob("*/*.safetensors"), *_json_files(folder), *(folder / "tokenizer").glob("[vm]*")]
    for path in paths:
        kept = path.rename(path.with_name("kept"))
        {
            "link out": lambda path=path: path.symlink_to(folder.parent / "outside" / path.relative_to(folder)),
            "loop": lambda path=path: path.symlink_to(path),
            "pipe": lambda path=path: os.mkfifo(path),
            "folder": path.mkdir,
            "dangling": lambda path=path: path.symlink_to("nowhere"),
        }[what]()
        message = _attempt(folder)
        optional = path.name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
        assert message is not None or (optional and what != "link out"), path
        path.rmdir() if what == "folder" else path.unlink()
        kept.rename(path)


def test_links_of_the_hub_cache_are_followed(pipeline: Pipelines, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123abc", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(pipeline("latent"), snapshot)
    blobs.mkdir()
    for number, path in enumerate(path for path in list(snapshot.rglob("*")) if path.is_file()):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    assert _attempt(snapshot, blobs, seconds=60) is None
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    assert "link out of the folder" in _refused(snapshot)


def test_settings_that_name_files_or_code_are_not_followed(hostile: Pipelines) -> None:
    folder, outside = hostile("latent"), "../outside"
    files = ("vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file", "tokenizer_config_file")
    named = {
        name: str(folder.parent / "outside" / "tokenizer" / "vocab.json") for name in (*files, "added_tokens_file")
    }
    code = {"auto_map": {key: ["evil.Evil", "evil.Evil"] for key in ("AutoTokenizer", "AutoModel", "AutoConfig")}}
    _edit(folder / "tokenizer" / "tokenizer_config.json", **named, **code, tokenizer_class="Evil", name_or_path=outside)
    _edit(folder / "tokenizer" / "special_tokens_map.json", **named)
    for component in ("unet", "vae", "text_encoder"):
        more = {"_attn_implementation": "evil/kernel", "attn_implementation": "evil/kernel", "use_kernels": True}
        quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
        _edit(folder / component / "config.json", **code, **more, **quantized, _name_or_path=outside)
        (folder / component / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": outside}))
    assert _attempt(folder, seconds=60) is None


def test_adapters_are_said_to_be_ignored(hostile: Pipelines, said: Callable[[], list[str]]) -> None:
    folder = hostile("latent")
    for place in ("", "unet"):
        (folder / place / "pytorch_lora_weights.safetensors").write_bytes(b"")
    assert _attempt(folder, seconds=60) is None
    assert [line.split(": ")[1].split(" is ")[0] for line in said() if "adapters are not applied" in line] == [
        "pytorch_lora_weights.safetensors",
        "unet/pytorch_lora_weights.safetensors",
    ]


def test_a_relative_folder_is_kept_as_an_absolute_one(
    pipeline: Pipelines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to(pipeline("latent"))
    monkeypatch.chdir(tmp_path)
    assert GuidanceConfig(name="owner/name").name == str(tmp_path / "owner" / "name")
    assert GuidanceConfig(name="owner/other").name == "owner/other"
    assert all(GuidanceConfig(name=name).name == name for name in KNOWN_GUIDANCE)


@pytest.mark.parametrize("options", [{"revision": "../../x"}, {"revision": "a//b"}, {"variant": "../x"}])
def test_revisions_and_variants_are_names(options: dict[str, str]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        create_guidance(GuidanceConfig(name="owner/name", **options))


LORA_CONTENTS: dict[str, bytes] = {
    **CONTENTS,
    "a header of all bytes": (2**63 - 1).to_bytes(8, "little") + b"{}",
    "a header that ends late": (100).to_bytes(8, "little") + b"{}",
    "tensors out of the file": (63).to_bytes(8, "little")
    + b'{"a.lora_up.weight":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'[:63],
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch marker'\ntR.",
    "a zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.quick(4)
@pytest.mark.parametrize("content", LORA_CONTENTS)
def test_additions_that_hold_something_else(hostile: Pipelines, content: str) -> None:
    folder = hostile("latent")
    path = folder.parent / "lora.safetensors"
    path.write_bytes(LORA_CONTENTS[content])
    for options in ({"lora": (str(path),)}, {"textual_inversion": (str(path),)}, {"name": str(path)}):
        message = _attempt(folder, path.parent, options=options)
        assert message is not None
        assert str(path) in message


def test_additions_that_are_none(hostile: Pipelines) -> None:
    folder = hostile("latent")
    path = folder.parent / "lora.safetensors"
    for make in (lambda: os.mkfifo(path), path.mkdir, lambda: path.symlink_to(path), lambda: path.symlink_to("x")):
        make()
        for options in ({"lora": (str(path),)}, {"textual_inversion": (str(path),)}, {"name": str(path)}):
            assert _attempt(folder, path.parent, options=options) is not None
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.slow
def test_names_of_a_lora_are_not_obeyed(hostile: Pipelines) -> None:
    """Neither as text for a terminal, nor as patterns, nor as names of files."""
    folder = hostile("latent")
    path = folder.parent / "lora.safetensors"
    slow = {"unet.alpha_pattern": {"(a+)+$": 1.0}}
    for metadata in ({"lora_adapter_metadata": json.dumps(slow)}, {"lora_adapter_metadata": "[" * 10**5}, {}):
        for name in ("unet." + "a" * 5000, "\x1b[2J", "../../outside", "unet.conv_in", "unet." + "a.processor." * 9):
            save_file({f"{name}.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}, path, metadata=metadata)
            assert _attempt(folder, path.parent, options={"lora": (str(path),)}) is not None
    (path.parent / "adapter_config.json").write_text("{}")
    save_file({f"t{i}.lora_A.weight": torch.ones(1) for i in range(60_000)}, path)
    assert _attempt(folder, path.parent, options={"lora": (str(path),)}) is not None
