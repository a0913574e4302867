"""Where text encoders run, in what arithmetic, and that they leave the memory."""

from __future__ import annotations

import itertools
import json
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamfusion_fast.errors import NonFiniteError, UserError
from dreamfusion_fast.gpu.memory import free_bytes
from dreamfusion_fast.guidance import GuidanceConfig, ScoreDistillation, create_guidance
from dreamfusion_fast.guidance.models import text_encoders
from dreamfusion_fast.guidance.models.pipeline_origins import open_source
from dreamfusion_fast.guidance.models.pipeline_source import PipelineSource
from dreamfusion_fast.guidance.models.text_encoders import PromptEncoder
from dreamfusion_fast.guidance.prompts import Prompt, PromptSet, shortened

pytest.importorskip("diffusers")

Pipelines = Callable[..., Path]
TEXTS = [Prompt("a teapot", "front"), Prompt("a teapot", "side"), Prompt("red")]


def _encoder(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> PromptEncoder:
    """Its texts can be embedded only where the device is a CPU; what it decides can be asked on any machine."""
    config = GuidanceConfig(name=str(folder), **options)
    source = open_source(config)
    suffixes = ("", "_2") if source.class_name("text_encoder_2") else ("",)
    return PromptEncoder(source, suffixes, config, dtype, torch.device(device))


@pytest.fixture
def imagined_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """imagined_gpu(free, bfloat16, accelerate): what the decisions read about GPU and libraries."""

    def imagine(free: int = 10**9, bfloat16: bool = True, installed: tuple[str, ...] = ("accelerate",)) -> None:
        monkeypatch.setattr(text_encoders, "free_bytes", lambda device: free)
        monkeypatch.setattr(text_encoders, "has_bfloat16", lambda device: bfloat16)
        monkeypatch.setattr(text_encoders, "installed", lambda library: library in installed)

    return imagine


def _dtypes(folder: Path, *where: Any, **options: Any) -> list[str]:
    encoder = _encoder(folder, *where, **options)
    return [encoder._dtype(suffix)[0] for suffix in encoder._suffixes]


def test_text_encoder_is_loaded_once_per_prompt(pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = PipelineSource.load

    def counting(self: PipelineSource, component: str, dtype: torch.dtype | None = None, **options: Any) -> Any:
        loaded.append(component)
        return load(self, component, dtype, **options)

    monkeypatch.setattr(PipelineSource, "load", counting)

    def guidance() -> ScoreDistillation:
        made = create_guidance(GuidanceConfig(name=str(pipeline("latent"))))
        assert isinstance(made, ScoreDistillation)
        return made

    embeddings = guidance().embed("a chair")
    assert loaded == ["tokenizer", "text_encoder"]
    again = guidance().embed("a chair")
    assert loaded == ["tokenizer", "text_encoder"]
    assert torch.equal(embeddings.tensors["hidden"], again.tensors["hidden"])
    guidance().embed("a red chair")
    assert loaded == ["tokenizer", "text_encoder"] * 2


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["latent", "sdxl", "pixel", "sd3", "flux"])
def test_one_model_in_memory_at_a_time(pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Whenever a model is loaded, the encoders loaded before are gone; so are all of them in the end."""
    encoders: list[weakref.ref[torch.nn.Module]] = []
    batches: list[int] = []
    load = PipelineSource.load

    def watching(self: PipelineSource, component: str, dtype: torch.dtype | None = None, **options: Any) -> Any:
        assert all(encoder() is None for encoder in encoders), f"an encoder is still there as {component} is loaded"
        loaded = load(self, component, dtype, **options)
        if component.startswith("text_encoder"):
            encoders.append(weakref.ref(loaded))
            loaded.register_forward_hook(lambda _, inputs, output: batches.append(len(inputs[0])))
        return loaded

    monkeypatch.setattr(PipelineSource, "load", watching)
    guidance = create_guidance(GuidanceConfig(name=str(pipeline(kind))))
    assert isinstance(guidance, ScoreDistillation)
    guidance.embed("a chair")
    assert all(encoder() is None for encoder in encoders)
    guidance.model.load()
    assert len(encoders) == {"sd3": 3, "sdxl": 2, "flux": 2}.get(kind, 1)
    assert batches == [5] * len(encoders), "four directions and the unconditional text in one batch"


def test_encoder_is_gone_after_it_failed(pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one place runs out of memory the next is tried, and the first copy is gone by then."""
    encoder = _encoder(pipeline("pixel"))
    expected = encoder.embed(TEXTS)["hidden"]
    loaded: list[weakref.ref[torch.nn.Module]] = []
    load = PipelineSource.load

    def failing_once(self: PipelineSource, component: str, dtype: torch.dtype | None = None, **options: Any) -> Any:
        model = load(self, component, dtype, **options)
        if dtype is None:
            return model
        assert all(other() is None for other in loaded)
        loaded.append(weakref.ref(model))
        if len(loaded) == 1:
            model.register_forward_pre_hook(_out_of_memory)
        return model

    monkeypatch.setattr(PipelineSource, "load", failing_once)
    monkeypatch.setattr(PromptEncoder, "_placements", lambda self, suffix: ["gpu", "cpu"])
    torch.testing.assert_close(encoder.embed(TEXTS)["hidden"], expected, rtol=0, atol=0)
    assert len(loaded) == 2
    loaded.clear()
    monkeypatch.setattr(PromptEncoder, "_placements", lambda self, suffix: ["gpu"])
    with pytest.raises(
        UserError, match="text_encoder does not fit into the memory of cpu: use guidance text_device auto"
    ):
        encoder.embed(TEXTS)


def _out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["latent", "sdxl", "pixel"])
def test_layer_by_layer_gives_the_same_numbers(pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Here the layers come to the CPU and not to a GPU, by the same code."""
    pytest.importorskip("accelerate")
    encoder = _encoder(pipeline(kind))
    expected = encoder.embed(TEXTS)
    monkeypatch.setattr(PromptEncoder, "_placements", lambda self, suffix: ["layers"])
    load, offloaded = PromptEncoder._load, []

    def recording(self: PromptEncoder, suffix: str, placement: Any) -> Any:
        model = load(self, suffix, placement)
        offloaded.append(all(parameter.is_meta for parameter in model.parameters()))
        return model

    monkeypatch.setattr(PromptEncoder, "_load", recording)
    for name, value in encoder.embed(TEXTS).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    assert offloaded
    assert all(offloaded), "weights stay in main memory between calls"


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["latent", "sdxl", "pixel"])
def test_weights_in_several_files(own_pipeline: Pipelines, kind: str) -> None:
    folder = own_pipeline(kind)
    expected = _encoder(folder).embed(TEXTS)
    component = folder / ("text_encoder_2" if kind == "sdxl" else "text_encoder")
    model = PipelineSource.load(open_source(GuidanceConfig(name=str(folder))), component.name, torch.float32)
    for path in component.glob("*.safetensors"):
        path.unlink()
    model.save_pretrained(component, max_shard_size="2KB")
    shards = sorted(component.glob("*.safetensors"))
    assert len(shards) > 2
    for name, value in _encoder(folder).embed(TEXTS).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{component.name} is incomplete, 1 of the files.*{shards[1].name}"):
        create_guidance(GuidanceConfig(name=str(folder)))


@pytest.mark.parametrize("kind", ["latent", "sdxl", "pixel"])
def test_parameters_are_counted_from_the_configuration(pipeline: Pipelines, kind: str) -> None:
    source = open_source(GuidanceConfig(name=str(pipeline(kind))))
    component = "text_encoder_2" if kind == "sdxl" else "text_encoder"
    model = source.load(component, torch.float32)
    assert source.parameters(component) == sum(parameter.numel() for parameter in model.parameters())


def test_configuration_that_describes_no_model(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("pixel")
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "feed_forward_proj": "none at all-"}))
    with pytest.raises(UserError, match=r"configuration of text_encoder \(T5EncoderModel\) describes no model"):
        open_source(GuidanceConfig(name=str(folder))).parameters("text_encoder")


def test_auto_dtype_of_clip(pipeline: Pipelines, imagined_gpu: Callable[..., None]) -> None:
    imagined_gpu()
    folder = pipeline("sdxl")
    half, wide = torch.float16, torch.float64
    assert _dtypes(folder, "cuda", half) == ["float16"] * 2
    assert _dtypes(folder, "cuda", half, text_device="cpu") == ["float32"] * 2
    assert _dtypes(folder, "cpu", half) == ["float32"] * 2
    assert _dtypes(folder, "cuda", torch.bfloat16) == ["bfloat16"] * 2
    assert _dtypes(folder, "cuda", wide) == ["float32"] * 2
    assert _dtypes(folder, "cuda", half, text_dtype="float32") == ["float32"] * 2
    assert _dtypes(folder, "cpu", wide, text_dtype="float16") == ["float16"] * 2


def test_auto_dtype_of_t5(
    pipeline: Pipelines, imagined_gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, half = pipeline("pixel"), torch.float16
    imagined_gpu()
    assert _dtypes(folder, "cuda", half) == ["bfloat16"]
    assert _dtypes(folder, "cuda", torch.float32) == ["float32"]
    assert _dtypes(folder, "cpu", half) == ["bfloat16"]
    imagined_gpu(bfloat16=False)
    assert _dtypes(folder, "cuda", half) == ["float32"]
    assert _dtypes(folder, "cuda", half, text_device="cpu") == ["bfloat16"]
    size = 4 * open_source(GuidanceConfig(name=str(folder))).parameters("text_encoder")
    for memory, expected in ((None, "float32"), (2 * size, "float32"), (size, "bfloat16")):
        monkeypatch.setattr(text_encoders, "_main_memory", lambda memory=memory: memory)
        assert _dtypes(folder, "cuda", half) == [expected]
        assert _dtypes(folder, "cpu", torch.float32) == [expected]
        assert _dtypes(folder, "cuda", torch.float32, text_dtype="float32") == ["float32"]


def test_placement_follows_free_memory(pipeline: Pipelines, imagined_gpu: Callable[..., None]) -> None:
    folder = pipeline("pixel")
    weights = open_source(GuidanceConfig(name=str(folder))).parameters("text_encoder")

    def placements(**options: Any) -> list[str]:
        return _encoder(folder, "cuda", torch.float16, **options)._placements("")

    fits = int(weights * 2 / 0.6) + 1
    imagined_gpu(free=fits)
    assert placements() == ["gpu", "layers", "cpu"]
    assert placements(text_dtype="float32") == ["layers", "cpu"]
    imagined_gpu(free=fits - 2)
    assert placements() == ["layers", "cpu"]
    assert placements(text_device="cuda") == ["gpu"]
    assert placements(text_device="cpu") == ["cpu"]
    imagined_gpu(free=fits - 2, installed=())
    with pytest.warns(UserWarning, match="runs on the CPU.*pip install accelerate"):
        assert placements() == ["cpu"]
    imagined_gpu(free=fits, installed=())
    assert placements() == ["gpu", "cpu"]
    imagined_gpu(free=fits - 2, installed=("accelerate", "bitsandbytes"))
    assert placements(text_dtype="int8") == ["gpu"]
    assert _encoder(folder)._placements("") == ["cpu"]


def test_identity_is_of_the_numbers_not_of_the_place(
    own_pipeline: Pipelines, imagined_gpu: Callable[..., None]
) -> None:
    folder = own_pipeline("pixel")
    imagined_gpu(installed=("accelerate", "bitsandbytes"))

    def identity(device: str = "cuda", dtype: torch.dtype = torch.float16, **options: Any) -> str:
        return _encoder(folder, device, dtype, **options).identity

    before = identity()
    imagined_gpu(free=0, installed=("accelerate", "bitsandbytes"))
    assert identity() == identity(text_device="cpu") == identity(text_device="cuda") == before
    assert identity("cpu", torch.bfloat16) == before
    names = ["float32", "bfloat16", "int8"]
    assert len({identity(text_dtype=name) for name in names}) == 3
    assert identity(text_dtype="bfloat16") == before
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert identity() != before


def test_identity_is_of_both_encoders(own_pipeline: Pipelines) -> None:
    folder = own_pipeline("sdxl")
    before = _encoder(folder).identity
    weights = next((folder / "text_encoder_2").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert _encoder(folder).identity != before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_embeds_near_the_float32_embedding(pipeline: Pipelines, name: str) -> None:
    for kind in ("latent", "sdxl") if name == "float16" else ("latent", "sdxl", "pixel"):
        expected = _encoder(pipeline(kind)).embed(TEXTS)
        for key, value in _encoder(pipeline(kind), text_dtype=name).embed(TEXTS).items():
            assert value.dtype == getattr(torch, name)
            error = (value.float() - expected[key]).norm() / expected[key].norm()
            assert 0 < error < {"bfloat16": 2e-2, "float16": 2e-3}[name], (kind, key)


def test_overflow_in_an_encoder_is_an_error(own_pipeline: Pipelines) -> None:
    from safetensors.torch import load_file, save_file

    folder = own_pipeline("latent")
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    tensors = load_file(weights)
    for name, value in tensors.items():
        if "fc" in name:
            value.mul_(1e4)
    save_file(tensors, weights, metadata={"format": "pt"})
    assert _encoder(folder).embed(TEXTS)["hidden"].isfinite().all()
    with pytest.raises(NonFiniteError, match="text_encoder gives NaN or infinity in float16: use guidance text_dtype"):
        _encoder(folder, text_dtype="float16").embed(TEXTS)


def _lost(encoder: PromptEncoder, prompts: PromptSet) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The embeddings, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tensors = encoder.embed(prompts.texts)
    return tensors, [str(warning.message) for warning in caught if "does not see" in str(warning.message)]


# Tokens of the tests' CLIP and of T5, less those of ", overhead view" and of start and end.
@pytest.mark.parametrize(("kind", "tokens", "room"), [("latent", 12, 7), ("pixel", 77, 73)])
def test_a_long_prompt_loses_its_own_words_and_no_view(pipeline: Pipelines, kind: str, tokens: int, room: int) -> None:
    encoder, words = _encoder(pipeline(kind)), ["a", "Red", "chair", "side"] * 20
    prompt, kept, lost = (" ".join(part) for part in (words, words[:room], words[room:]))
    found, warned = _lost(encoder, PromptSet(prompt, "red"))
    assert len(warned) == 1
    assert warned[0].endswith(f" reads at most {tokens} tokens of a prompt: of {prompt!r} it does not see {lost!r}")
    expected, warned = _lost(encoder, PromptSet(kept, "red"))
    assert warned == [], "it fits to the token"
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
        for first, second in itertools.combinations(value, 2):
            assert not torch.equal(first, second)


def test_both_encoders_read_the_same_words_of_a_long_prompt(own_pipeline: Pipelines) -> None:
    """It fits the first; the second takes more tokens, since its pad token "c" parts "chair" and "back"."""
    folder = own_pipeline("sdxl")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / "tokenizer_2" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": "c"}))
    encoder = _encoder(folder)
    found, warned = _lost(encoder, PromptSet("a red teapot a chair a"))
    assert len(warned) == 1
    assert warned[0].endswith("of 'a red teapot a chair a' it does not see 'chair a'")
    expected, warned = _lost(encoder, PromptSet("a red teapot a"))
    assert warned == []
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
        for first, second in itertools.combinations(value, 2):
            assert not torch.equal(first, second)


def test_a_long_prompt_without_views_and_a_long_negative_prompt_are_warned_of(pipeline: Pipelines) -> None:
    prompts = PromptSet("a red chair " * 4, "red teapot " * 6, view_dependent=False)
    _, warned = _lost(_encoder(pipeline("latent")), prompts)
    assert [message.split(" it does not see ")[1] for message in warned] == ["'red chair'", "'red teapot'"]


@pytest.mark.parametrize(
    ("prompt", "most", "kept", "lost"),
    [
        ("a teapot of clay", 31, "a teapot of clay", None),
        ("a teapot of clay", 30, "a teapot of", "clay"),
        ("a teapot of clay", 16, "a", "teapot of clay"),
        ("紅色的茶壺和椅子", 20, "紅色的茶壺", "和椅子"),
        ("a teapot", 15, "", "a teapot"),
        ("a teapot", 3, "", "a teapot"),
    ],
)
def test_which_words_are_left_out(prompt: str, most: int, kept: str, lost: str | None) -> None:
    """Here a token is a character; ", overhead view" has 15."""
    negative = "ugly" if most > 3 else ""
    texts, left_out = shortened(PromptSet(prompt, negative).texts, lambda text: len(text) <= most)
    assert texts == [f"{kept}, {view} view" for view in ("front", "side", "back", "overhead")] + [negative]
    assert left_out == ({} if lost is None else {prompt: lost})


def test_choices_that_this_machine_or_encoder_cannot_follow(
    pipeline: Pipelines, imagined_gpu: Callable[..., None]
) -> None:
    imagined_gpu(installed=())
    for message, kind, device, options in [
        ("text_device cuda: this run is on cpu", "latent", "cpu", {"text_device": "cuda"}),
        ("text_dtype int8 needs a GPU", "pixel", "cpu", {"text_dtype": "int8"}),
        ("int8 needs bitsandbytes and accelerate, not installed.*pip install", "pixel", "cuda", {"text_dtype": "int8"}),
        ("T5, whose activations overflow in float16", "pixel", "cuda", {"text_dtype": "float16"}),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            _encoder(pipeline(kind), device, **options)
        assert "\n" not in str(caught.value)
    imagined_gpu(installed=("accelerate",))
    with pytest.raises(UserError, match="int8 needs bitsandbytes, not installed"):
        _encoder(pipeline("pixel"), "cuda", text_dtype="int8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_device": "gpu"}, "text_device: got 'gpu', want one of auto, cpu, cuda"),
        (
            {"text_dtype": "int4"},
            "text_dtype: got 'int4', want one of auto, float32, bfloat16, float16, int8",
        ),
        ({"text_dtype": "int8", "text_device": "cpu"}, "want a GPU for int8"),
    ],
)
def test_choices_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GuidanceConfig(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["latent", "sdxl", "pixel"])
@pytest.mark.parametrize("placement", ["gpu", "layers", "cpu"])
def test_placements_on_a_gpu(pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch, kind: str, placement: str) -> None:
    if placement == "layers":
        pytest.importorskip("accelerate")
    expected = _encoder(pipeline(kind)).embed(TEXTS)
    encoder = _encoder(pipeline(kind), "cuda", torch.float32)
    monkeypatch.setattr(PromptEncoder, "_placements", lambda self, suffix: [placement])
    # cuBLAS keeps a workspace from its first product on.
    torch.ones(2, 2, device="cuda").mm(torch.ones(2, 2, device="cuda"))
    before = torch.cuda.memory_allocated()
    for name, value in encoder.embed(TEXTS).items():
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_free_memory_heeds_the_limit_of_the_process(pipeline: Pipelines) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    before = free_bytes(device)
    assert 0 < before <= torch.cuda.mem_get_info(device)[1]
    if hasattr(torch.cuda, "get_per_process_memory_fraction"):
        fraction = torch.cuda.get_per_process_memory_fraction(device)
        try:
            torch.cuda.set_per_process_memory_fraction(0.05, device)
            assert free_bytes(device) <= 0.05 * torch.cuda.mem_get_info(device)[1]
        finally:
            torch.cuda.set_per_process_memory_fraction(fraction, device)


@pytest.mark.gpu
def test_int8_embeds_near_the_float32_embedding(pipeline: Pipelines) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    expected = _encoder(pipeline("pixel")).embed(TEXTS)["hidden"]
    found = _encoder(pipeline("pixel"), "cuda", torch.float16, text_dtype="int8").embed(TEXTS)["hidden"].float()
    assert 0 < (found - expected).norm() / expected.norm() < 0.1
