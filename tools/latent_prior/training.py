"""The training as a whole: first the autoencoder, then the U-Net on its latents, cut and resumed anywhere."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from prior_data.probe import SHEET_PROMPTS
from torch import Tensor
from training_loop import Call, Phase, Report, run, seed_step
from training_state import load_state, optimizer_state, save_state

from dreamfusion_fast.io import write_text

from . import autoencoder, diffusion, looks
from .latents import LatentPool, make_sampler, measure_scale
from .networks import Autoencoding, Precision, Shape, make_autoencoder, make_scheduler, make_unet

_HELD_OUT_STREAM = 4
HALF_MAX = torch.finfo(torch.float16).max


@dataclasses.dataclass
class Settings:
    """Of a training; all but lengths, `save_every` and `compile` must stay the same from call to call.

    Args:
        shape: widths of the networks.
        vae_steps, unet_steps: lengths in steps, or None for:
        vae_seconds, unet_seconds: lengths by the clock.
        vae_rate, unet_rate: peak learning rates.
        vae_batch, unet_batch: images and latents per step.
        pool, pool_block, renew_every: of `LatentPool`.
        seed: of everything that is drawn.
        save_every: steps between saved states; None: at the end of a phase and of a call only.
        bfloat16: arithmetic; None: on a GPU.
        compile: torch.compile; None: on a GPU.
        probe_views, sheet_steps: of the looks at the end of each call; 0: no such look.

    Raises:
        ValueError: a number is too small.
    """

    shape: Shape = dataclasses.field(default_factory=Shape)
    vae_steps: int | None = None
    unet_steps: int | None = None
    vae_seconds: float = 150.0
    unet_seconds: float = 480.0
    vae_rate: float = 1e-3
    unet_rate: float = 1e-3
    vae_batch: int = 128
    unet_batch: int = 512
    pool: int = 2**19
    pool_block: int = 4096
    renew_every: int = 64
    seed: int = 0
    save_every: int | None = None
    bfloat16: bool | None = None
    compile: bool | None = None
    probe_views: int = 2048
    sheet_steps: int = 40

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if field.name in ("seed", "probe_views", "sheet_steps"):
                if value < 0:
                    raise ValueError(f"{field.name} must be at least 0, got {value}")
            elif value <= 0:
                raise ValueError(f"{field.name} must be above 0, got {value}")


class Training:
    """Networks, their state, and the two phases.

    Args:
        data: folder made by `prior_data.build`.
        text_encoder: folder of the package's text encoder.
        out: folder of state, record and pictures; a state found there is gone on with.
        settings: see there.
        call: limits of this call.

    Raises:
        ValueError: a folder that lacks something, or a state of other widths or another seed.
    """

    def __init__(self, data: Path, text_encoder: Path, out: Path, settings: Settings, call: Call) -> None:
        self.settings, self.out, self.call = settings, out, call
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = self.device.type == "cuda"
        self._precision = Precision(self.device, on_gpu if settings.bfloat16 is None else settings.bfloat16)
        self._compiles = on_gpu if settings.compile is None else settings.compile
        s = settings
        self.phases = {
            "autoencoder": Phase("autoencoder", 1, s.vae_rate, s.vae_steps, s.vae_seconds),
            "unet": Phase("unet", 2, s.unet_rate, s.unet_steps, s.unet_seconds),
        }
        self.log: list[dict[str, Any]] = []
        self.results: dict[str, Any] = {}
        seed_step(s.seed, 0, 0)
        # Channels last is how tensor cores read images.
        last = {"memory_format": torch.channels_last} if on_gpu else {}
        self.vae = make_autoencoder(s.shape).to(self.device, **last)
        self.unet = make_unet(s.shape).to(self.device, **last)
        self.average = [p.detach().clone() for p in self.unet.parameters()]
        state = load_state(out, self.device)
        self._resume(state)
        self.sampler = make_sampler(data, text_encoder, self.device)
        call.say(f"data: {self.sampler.summary()}")

    def _resume(self, state: dict[str, Any] | None) -> None:
        self._optimizer_state: dict[str, Any] | None = None
        if state is None:
            return
        for name, wanted in self._identity().items():
            if state["identity"][name] != wanted:
                raise ValueError(f"out: the state there was made with {name} {state['identity'][name]}, got {wanted}")
        for name, (step, elapsed) in state["phases"].items():
            self.phases[name].step, self.phases[name].elapsed = step, elapsed
        self._load_vae(state["vae"], state["results"].get("scaling_factor"))
        self.unet.load_state_dict(state["unet"])
        self.average = state["average"]
        self.log, self.results = state["log"], state["results"]
        self._optimizer_state = state["optimizer"]
        steps = ", ".join(f"{name} step {phase.step}" for name, phase in self.phases.items())
        self.call.say(f"goes on from {steps}")

    def _identity(self) -> dict[str, Any]:
        shape = self.settings.shape
        widths = [*shape.vae_channels, *shape.unet_channels, shape.groups, shape.heads]
        return {"widths": widths, "seed": self.settings.seed}

    def run(self) -> bool:
        """Go on until both phases are done or the call is over; whether they are done."""
        if self.results.get("scaling_factor") is None and self._autoencoder():
            self._finish_autoencoder()
        done = self.results.get("scaling_factor") is not None and self._unet()
        self._look(done)
        return done

    def _autoencoder(self) -> bool:
        phase, settings = self.phases["autoencoder"], self.settings
        autoencoding = Autoencoding(self.vae)
        called = torch.compile(autoencoding) if self._compiles else autoencoding

        def step_loss(step: int) -> tuple[Tensor, Tensor, Tensor]:
            seed_step(settings.seed, phase.stream, step)
            images = self.sampler.pictures(*self.sampler.draw(settings.vae_batch))[0]
            parts = autoencoder.terms(called, images, self._precision)
            return autoencoder.total(parts), parts.detach(), torch.ones_like(parts)

        return self._train(phase, step_loss, list(self.vae.parameters()), autoencoder.COLUMNS)

    def _finish_autoencoder(self) -> None:
        """Round it to float16, as it is stored; measure it; from now on it stays as it is."""
        state = {name: value.half() for name, value in self.vae.state_dict().items()}
        if any(not value.isfinite().all() for value in state.values()):
            raise SystemExit(f"autoencoder: weights beyond {HALF_MAX:.0f}; nothing was written")
        self._load_vae(state, 1.0)
        factor = measure_scale(self.sampler, self._encode, self.settings.seed, min(8192, self.settings.pool))
        self._load_vae(state, round(factor, 5))
        seed_step(0, _HELD_OUT_STREAM, 0)
        images = self.sampler.pictures(*self.sampler.draw(min(256, self.settings.pool), held_out=True))[0]
        latents = autoencoder.encode(self.vae, images, self._precision)
        output = autoencoder.decode(self.vae, latents, self._precision)
        self.results |= {"scaling_factor": round(factor, 5), "psnr_db": round(autoencoder.psnr(images, output), 2)}
        self.call.say(f"autoencoder done: {self.results}")
        rows = len(images[:64]) // 4
        pairs = torch.stack([images[: 4 * rows], output[: 4 * rows]], 1).flatten(0, 1)
        looks.save_sheet(looks.sheet(pairs, columns=8), self.out / "autoencoder.jpg")
        self._optimizer_state = None
        self._save(None)

    def _load_vae(self, state: dict[str, Tensor], factor: float | None) -> None:
        self.vae.load_state_dict({name: value.float() for name, value in state.items()})
        if factor is not None:
            self.vae.register_to_config(scaling_factor=factor)
            self.vae.eval().requires_grad_(False)

    def _encode(self, images: Tensor) -> Tensor:
        return autoencoder.encode(self.vae, images, self._precision) * self.vae.config.scaling_factor

    def _unet(self) -> bool:
        phase, settings = self.phases["unet"], self.settings
        if phase.progress >= 1:
            return True
        if self.call.over:
            return False
        pool = LatentPool(
            self.sampler, self._encode, settings.seed, settings.pool, settings.pool_block, settings.renew_every
        )
        pool.at(phase.step)
        self.call.say(f"{len(pool.latents)} latents, standard deviation {pool.latents.float().std().item():.3f}")
        alphas_cumprod = make_scheduler().alphas_cumprod.to(self.device)
        unet = torch.compile(self.unet) if self._compiles else self.unet

        def step_loss(step: int) -> tuple[Tensor, Tensor, Tensor]:
            pool.at(step)
            seed_step(settings.seed, phase.stream, step)
            latents, tokens = pool.batch(settings.unet_batch)
            return diffusion.training_loss(unet, latents, tokens, alphas_cumprod, self._precision)

        return self._train(phase, step_loss, list(self.unet.parameters()), diffusion.COLUMNS, self.average)

    def _train(
        self, phase: Phase, step_loss: Any, parameters: list[Any], columns: Any, average: list[Tensor] | None = None
    ) -> bool:
        """Run a phase and save it; whether it is done."""
        optimizer = torch.optim.AdamW(
            parameters, lr=phase.peak_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=self.device.type == "cuda"
        )
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
            self._optimizer_state = None
        report = Report(phase, self.call, columns, self.log)
        first = phase.step
        run(phase, step_loss, parameters, optimizer, self.call, report, average, self.settings.save_every,
            lambda: self._save(optimizer))  # fmt: skip
        if phase.step > first:
            self._save(optimizer)
        return phase.progress >= 1

    def _save(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Everything; once the autoencoder is done, its weights as the float16 that they are."""
        vae = self.vae.state_dict()
        if self.results.get("scaling_factor") is not None:
            vae = {name: value.half() for name, value in vae.items()}
        state = {
            "identity": self._identity(),
            "phases": {name: (phase.step, phase.elapsed) for name, phase in self.phases.items()},
            "vae": vae,
            "unet": self.unet.state_dict(),
            "average": self.average,
            "optimizer": None if optimizer is None else optimizer_state(optimizer),
            "log": self.log,
            "results": self.results,
        }
        # The step at which the autoencoder is done is saved twice, before and after it is rounded.
        finished = self.results.get("scaling_factor") is not None
        save_state(self.out, state, 2 * sum(phase.step for phase in self.phases.values()) + finished)

    def _look(self, done: bool) -> None:
        """Record, and where there is a U-Net to look at, its probe and its samples."""
        if self.phases["unet"].step > 0:
            unet, encoder = averaged_unet(self.settings.shape, self.unet, self.average), self.sampler.encoder
            scheduler = make_scheduler()
            alphas_cumprod = scheduler.alphas_cumprod.to(self.device)
            if done and self.settings.probe_views:
                self.results["probe"] = looks.probe(
                    self.vae, unet, self.sampler, alphas_cumprod, self._precision, self.settings.probe_views
                )
                for name, row in self.results["probe"].items():
                    print(f"probe {name:16s} {row}")
            if self.settings.sheet_steps:
                steps = self.settings.sheet_steps
                picture = looks.sample_sheet(
                    self.vae, unet, scheduler, encoder, self._precision, SHEET_PROMPTS, steps=steps
                )
                looks.save_sheet(picture, self.out / "samples.jpg")
        record = {name: {"steps": p.step, "seconds": round(p.elapsed, 1)} for name, p in self.phases.items()}
        self.out.mkdir(parents=True, exist_ok=True)
        record |= {"settings": dataclasses.asdict(self.settings), "done": done, **self.results, "log": self.log}
        write_text(self.out / "training.json", json.dumps(record, indent=1))


def averaged_unet(shape: Shape, unet: Any, average: list[Tensor]) -> Any:
    """A copy of the U-Net with the averaged weights, to evaluate."""
    copy = make_unet(shape)
    copy.load_state_dict({name: value.cpu() for name, value in unet.state_dict().items()})
    with torch.no_grad():
        for parameter, value in zip(copy.parameters(), average, strict=True):
            parameter.copy_(value)
    return copy.to(average[0].device).eval().requires_grad_(False)
