"""The training: its settings, its loss, and its state from call to call."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from prior_data.batches import CatalogueSampler
from torch import Tensor
from training_loop import Call, Phase, Report, run, seed_step
from training_state import load_state, optimizer_state, save_state

from dreamfusion_fast.fields.triplane_field import TriplaneFieldConfig
from dreamfusion_fast.io import write_text
from dreamfusion_fast.networks.plane_transformer import PlaneTransformerConfig
from dreamfusion_fast.training.amortised import AmortisedField
from dreamfusion_fast.training.config_io import from_dict, to_dict

from .batches import ObjectBatch, ObjectSampler
from .rendering import ObjectRenderer

COLUMNS = ("loss", "colour", "opacity", "distortion")
_STREAM = 1  # of random numbers
_COLOUR_WEIGHT = 3.0
# 14 million weights: 13 MB as int8, so that they, the prior and its text encoder stay below 48 MB.
NETWORK = PlaneTransformerConfig(width=320, heads=5, blocks=8)
FIELD = TriplaneFieldConfig(hidden=64, hidden_layers=2, blob_scale=5.0, blob_radius=0.75, mlp_dtype="auto")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a training; all but the lengths and `save_every` must stay the same from call to call.

    Args:
        network: the Transformer.
        field: what reads its planes; resolution and features are the network's.
        steps: length in steps, or None for:
        seconds: length by the clock.
        objects, views, rays: per step: objects, views of each, rays through each.
        samples_across: samples along the diagonal of the box.
        rate, code_rate: peak learning rates of the network and of the codes.
        distortion: weight of the distortion loss (mip-NeRF 360, eq. 15), which makes surfaces of fog.
        seed: of everything that is drawn.
        save_every: steps between saved states; None: at the end of a call only.

    Raises:
        ValueError: a number is too small.
    """

    network: PlaneTransformerConfig = NETWORK
    field: TriplaneFieldConfig = FIELD
    steps: int | None = None
    seconds: float = 480.0
    objects: int = 32
    views: int = 4
    rays: int = 512
    samples_across: int = 128
    rate: float = 5e-4
    code_rate: float = 3e-3
    distortion: float = 0.0
    seed: int = 0
    save_every: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, may_be_0 = getattr(self, field.name), field.name in ("seed", "distortion")
            if isinstance(value, (int, float)) and not (value >= 0 if may_be_0 else value > 0):
                raise ValueError(f"{field.name} must be {'at least' if may_be_0 else 'above'} 0, got {value}")
        sides = {"resolution": self.network.resolution, "features": self.network.features}
        object.__setattr__(self, "field", dataclasses.replace(self.field, **sides))


class Training:
    """The model, its state, and the loop.

    Args:
        data: folder made by `prior_data.build`.
        text_encoder: folder of the package's text encoder, or a module that is called as it is.
        out: folder of state and record; a state found there is gone on with.
        settings: see there.
        call: limits of this call.

    Raises:
        ValueError: a folder that lacks something, or a state made with other settings.
    """

    def __init__(self, data: Path, text_encoder: Any, out: Path, settings: Settings, call: Call) -> None:
        self.settings, self.out, self.call = settings, out, call
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        s = settings
        self.phase = Phase("amortised", _STREAM, s.rate, s.steps, s.seconds)
        state = load_state(out, self.device)
        self._check_same(state)
        self.sampler = ObjectSampler(CatalogueSampler(data, text_encoder, self.device, suffixes=("",)))
        call.say(f"data: {self.sampler.catalogue.summary()}")
        generator = torch.Generator().manual_seed(s.seed)
        self.model = AmortisedField(s.network, s.field, len(self.sampler.models), generator).to(self.device)
        if self.device.type == "cuda":
            # The GPU waits for launches otherwise. The first step of a call compiles, and does not count.
            self.model.network.compile(dynamic=False)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._names, self.parameters = list(trained), list(trained.values())
        self.average = [p.detach().clone() for p in self.parameters]
        self.renderer = ObjectRenderer(self.model.field, s.samples_across, self.device)
        self.log: list[dict[str, Any]] = []
        self.optimizer = self._make_optimizer()
        if state is not None:
            self._resume(state)

    def _make_optimizer(self) -> torch.optim.AdamW:
        codes = self.model.codes
        groups = [
            {"params": [p for p in self.parameters if p is not codes]},
            {"params": [codes], "scale": self.settings.code_rate / self.settings.rate, "weight_decay": 0.0},
        ]
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(groups, lr=self.settings.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)

    def run(self) -> bool:
        """Go on until the training is done or the call is over; whether it is done."""
        report = Report(self.phase, self.call, COLUMNS, self.log)
        first, s = self.phase.step, self.settings
        run(
            self.phase, self._loss, self.parameters, self.optimizer, self.call, report, self.average, s.save_every,
            self._save,
        )  # fmt: skip
        if self.phase.step > first:
            self._save()
        done = self.phase.progress >= 1
        record = {"steps": self.phase.step, "seconds": round(self.phase.elapsed, 1), "done": done}
        write_text(self.out / "training.json", json.dumps(record | {"settings": to_dict(s), "log": self.log}, indent=1))
        return done

    def _loss(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        s = self.settings
        seed_step(s.seed, _STREAM, step)
        batch = self.sampler.draw(s.objects, s.views, s.rays)
        output = self.renderer.render(
            self.planes(batch), batch.rays, batch.scene, batch.background, step, with_distortion=s.distortion > 0
        )
        colour = (output.color - batch.color).square().mean()
        opacity = (output.opacity - batch.opacity).square().mean()
        distortion = output.distortion_loss if output.distortion_loss is not None else torch.zeros_like(colour)
        loss = _COLOUR_WEIGHT * colour + opacity + s.distortion * distortion
        parts = torch.stack([loss, colour, opacity, distortion]).detach()
        return loss, parts, torch.ones_like(parts)

    def planes(self, batch: ObjectBatch) -> Tensor:
        """Of the objects of a batch. Products are in bfloat16 on a GPU; what reads the planes has float32."""
        nothing = torch.full_like(self.model.codes[:1], float("nan"))
        code = torch.where(batch.coded[:, None], self.model.codes[batch.objects], nothing)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model.planes(batch.states, batch.pooled, code)

    def _check_same(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        for name, wanted in self._identity().items():
            if state["identity"].get(name) != wanted:
                raise ValueError(f"state: was made with {name} {state['identity'].get(name)}, got {wanted}")

    def _identity(self) -> dict[str, Any]:
        free = ("steps", "seconds", "save_every")
        return {name: value for name, value in to_dict(self.settings).items() if name not in free}

    def _resume(self, state: dict[str, Any]) -> None:
        self.phase.step, self.phase.elapsed = state["phase"]
        self.log = state["log"]
        with torch.no_grad():
            for kind, tensors in (("parameters", self.parameters), ("average", self.average)):
                for name, tensor in zip(self._names, tensors, strict=True):
                    tensor.copy_(state[kind][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.call.say(f"goes on from step {self.phase.step}")

    def _save(self) -> None:
        state = {
            "identity": self._identity(),
            "phase": (self.phase.step, self.phase.elapsed),
            "parameters": dict(zip(self._names, _rounded(self.parameters), strict=True)),
            "average": dict(zip(self._names, _rounded(self.average), strict=True)),
            "optimizer": optimizer_state(self.optimizer),
            "log": self.log,
        }
        save_state(self.out, state, self.phase.step)


@torch.no_grad()
def _rounded(tensors: list[Tensor]) -> list[Tensor]:
    """As float16, half of the file saved. The tensors themselves are rounded alike, as `optimizer_state` does it."""
    halves = [tensor.half() for tensor in tensors]
    for tensor, half in zip(tensors, halves, strict=True):
        tensor.copy_(half)
    return halves


def averaged_of(out: Path) -> tuple[AmortisedField, dict[str, Any]]:
    """The averaged weights of a training as a model on the CPU, and the record of that training.

    Raises:
        ValueError: there is no state in the folder.
    """
    state = load_state(out)
    if state is None:
        raise ValueError(f"state: there is none in {out}")
    network = from_dict(PlaneTransformerConfig, state["identity"]["network"])
    field = from_dict(TriplaneFieldConfig, state["identity"]["field"])
    model = AmortisedField(network, field, len(state["average"]["codes"]))
    model.load_trained_state({name: value.float() for name, value in state["average"].items()})
    steps, seconds = state["phase"]
    return model.eval().requires_grad_(False), {"steps": steps, "seconds": seconds}
