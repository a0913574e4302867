"""Running out of memory in a step: the step is repeated with less, and the run is as if nothing had happened."""

from __future__ import annotations

import pytest
import torch
from fakes import small_config
from noisy import NoisyGuidance

from dreamfusion_fast.errors import DoesNotFitError, UserError
from dreamfusion_fast.gpu.memory import is_out_of_memory, what_was_wanted
from dreamfusion_fast.rendering.volume.renderer import VolumeRenderer
from dreamfusion_fast.training import trainer as module
from dreamfusion_fast.training.memory_plan import SMALL_BUDGET
from dreamfusion_fast.training.trainer import Trainer

CPU = torch.device("cpu")
STEPS = 10
ERROR = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8.00 GiB of which ..."


class Fault:
    """Raises at chosen calls, counted from 0."""

    def __init__(self, *calls):
        self.calls, self.count = set(calls), 0

    def __call__(self, *arguments):
        self.count += 1
        if self.count - 1 in self.calls:
            raise torch.OutOfMemoryError(ERROR)


def before(method, fault):
    def wrapped(*arguments, **options):
        fault()
        return method(*arguments, **options)

    return wrapped


def after(method, fault):
    def wrapped(*arguments, **options):
        result = method(*arguments, **options)
        fault()
        return result

    return wrapped


def trainer_of(**settings):
    return Trainer(small_config(steps=STEPS, **settings), CPU, NoisyGuidance())


def state_of(trainer):
    return {name: value.clone() for name, value in trainer.state()[0].items()}


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def run(trainer):
    results = [trainer.step() for _ in range(STEPS)]
    assert [result.step for result in results] == list(range(1, STEPS + 1))
    return state_of(trainer) | {f"sds {k}": result.losses["sds"] for k, result in enumerate(results)}


@pytest.fixture(scope="module")
def undisturbed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield run(trainer_of())
    torch.set_num_threads(threads)


def break_occupancy_midway(trainer, patch, fault):
    patch.setattr(trainer.scene.occupancy, "_update", after(trainer.scene.occupancy._update, fault))


def break_occupancy_after_its_pack(trainer, patch, fault):
    patch.setattr(trainer.scene.occupancy, "_pack", after(trainer.scene.occupancy._pack, fault))


def break_render(trainer, patch, fault):
    patch.setattr(VolumeRenderer, "render", after(VolumeRenderer.render, fault))


def break_guidance(trainer, patch, fault):
    patch.setattr(trainer.guidance, "before", fault)


def break_losses(trainer, patch, fault):
    patch.setattr(module, "regularisers", before(module.regularisers, fault))


def break_backward_at_its_end(trainer, patch, fault):
    """When the first layer's gradient, the last but the table's, has been added to the parameter."""
    trainer.scene.field.layers[0].weight.register_post_accumulate_grad_hook(fault)


def break_optimiser_before_its_update(trainer, patch, fault):
    patch.setattr(trainer.optimizer, "step", before(trainer.optimizer.step, fault))


# The grid is updated before steps 0, 4 and 8; the other calls are one per step.
BREAKS = [(break_at, at) for break_at in (break_occupancy_midway, break_occupancy_after_its_pack) for at in (0, 1, 2)]
BREAKS += [
    (break_at, at)
    for break_at in (
        break_render,
        break_guidance,
        break_losses,
        break_backward_at_its_end,
        break_optimiser_before_its_update,
    )
    for at in (0, 3, 8)
]


@pytest.mark.quick(4)
@pytest.mark.parametrize(("break_at", "at"), BREAKS, ids=lambda value: getattr(value, "__name__", value))
def test_the_run_is_as_if_nothing_had_happened(undisturbed, monkeypatch, said, break_at, at):
    trainer, fault = trainer_of(), Fault(at)
    break_at(trainer, monkeypatch, fault)
    assert_same_bits(run(trainer), undisturbed)
    assert fault.count > at
    lines = said()
    assert len(lines) == 1
    assert "(Tried to allocate 20.00 MiB); from here on a render workspace of 17 MB" in lines[0]
    assert trainer.plan.render_budget == trainer.scene.renderer.config.memory_budget == SMALL_BUDGET
    assert not trainer.scene.renderer.config.graphs


def test_down_the_whole_ladder_in_one_step_and_in_several(undisturbed, monkeypatch, said):
    trainer = trainer_of()
    # Calls 2 and 3 are of step 3, tried twice. From call 4 on a step has two, and 11 is the second one of step 6.
    break_guidance(trainer, monkeypatch, Fault(2, 3, 11))
    assert_same_bits(run(trainer), undisturbed)
    assert trainer.guidance.sizes[:5] == [2, 2, 2, 2, 1]
    assert trainer.guidance.freed == 3, "graphs captured for more views are freed on each rung"
    assert trainer.guidance.sizes[-2:] == [1, 1]
    assert trainer.plan.views_per_call == 1
    assert trainer.plan.recompute
    assert trainer.guidance.recompute
    assert [line.split("; from here on ")[1] for line in said()] == [
        "a render workspace of 17 MB, kept for no later render",
        "1 of 2 views at a time through the guidance",
        "the encoding recomputed in its backward",
    ]


def test_a_step_whose_clean_up_fails_after_it_ran_out_of_memory_is_repeated(undisturbed, said):
    """Leaving a CUDA graph capture raises an error of its own, and hides the first one."""
    trainer, fault = trainer_of(), Fault(3)

    def captured(*arguments):
        try:
            fault()
        finally:
            if fault.count == 4:
                raise RuntimeError(CAPTURE)

    trainer.guidance.before = captured
    assert_same_bits(run(trainer), undisturbed)
    assert said()[0].startswith("out of memory in step 4 (Tried to allocate 20.00 MiB); from here on ")


def test_at_the_end_of_the_ladder_the_error_says_what_would_fit(monkeypatch):
    trainer = trainer_of()
    for _ in range(3):
        trainer.step()
    healthy, saved = trainer.guidance.before, state_of(trainer)
    trainer.guidance.before = Fault(*range(100))
    with pytest.raises(
        DoesNotFitError, match=r"out of memory in step 4 \(Tried to allocate .*nothing is left to save: "
    ):
        trainer.step()
    assert trainer.steps_done == 3
    assert_same_bits(state_of(trainer), saved)
    assert all(parameter.grad is None for parameter in trainer.scene.field.parameters())
    # And when there is memory again, the run goes on.
    trainer.guidance.before = healthy
    other = trainer_of()
    for _ in range(STEPS - 3):
        trainer.step()
    run(other)
    assert_same_bits(state_of(trainer), state_of(other))


def test_other_errors_are_not_held_up():
    trainer = trainer_of()

    def bug(views):
        raise RuntimeError("a bug")

    trainer.guidance.before = bug
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.step()
    assert trainer.plan == trainer.planner.ladder[0]


def test_nothing_of_the_broken_step_is_held_while_it_is_repeated(monkeypatch):
    """The images of the first try are gone before the second renders."""
    import weakref

    trainer, seen, alive = trainer_of(), [], []
    render = VolumeRenderer.render

    def watched(*arguments, **options):
        alive.append(sum(image() is not None for image in seen))
        output = render(*arguments, **options)
        seen.append(weakref.ref(output.color))
        return output

    monkeypatch.setattr(VolumeRenderer, "render", watched)
    trainer.guidance.before = Fault(0, 1)
    trainer.step()
    assert alive == [0, 0, 0]


def test_a_step_makes_the_optimiser_s_state_as_the_optimiser_does():
    trainer = trainer_of()
    parameters = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    theirs = trainer.optimizer.state_dict()["state"]
    other = trainer_of()
    other._optimizer_step.prepare()
    ours = other.optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index, entries in theirs.items():
        assert ours[index].keys() == entries.keys()
        for name, value in entries.items():
            mine = ours[index][name]
            assert (mine.dtype, mine.shape, mine.device) == (value.dtype, value.shape, value.device)
            torch.testing.assert_close(mine, torch.zeros_like(value))
            assert torch.count_nonzero(value) == (name == "step")


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError(ERROR), True),
        (MemoryError(), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you ..."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_mean_it(error, is_one):
    assert is_out_of_memory(error) == is_one


def while_handling(handled, error, **cause):
    """`error` as it is after it was raised while `handled` was being handled; cause=x: raised from x."""
    try:
        try:
            raise handled
        except Exception:
            if cause:
                raise error from cause["cause"]
            raise error  # noqa: B904 (this is how libraries do it)
    except Exception as caught:
        return caught


def circle():
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    return first


CAPTURE = "CUDA error: operation failed due to a previous error during capture"


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (while_handling(torch.OutOfMemoryError(ERROR), RuntimeError(CAPTURE)), True),
        (while_handling(KeyError(), RuntimeError(CAPTURE), cause=torch.OutOfMemoryError(ERROR)), True),
        (while_handling(while_handling(MemoryError(), RuntimeError(CAPTURE)), RuntimeError("no graph")), True),
        (while_handling(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), RuntimeError(CAPTURE)), True),
        (while_handling(torch.OutOfMemoryError(ERROR), RuntimeError(CAPTURE), cause=None), False),
        (while_handling(torch.OutOfMemoryError(ERROR), TypeError("a bug")), False),
        (while_handling(torch.OutOfMemoryError(ERROR), UserError("use a smaller model")), False),
        (while_handling(KeyError(), RuntimeError("a bug")), False),
        (circle(), False),
    ],
)
def test_what_an_error_was_raised_for_counts(error, is_one):
    assert is_out_of_memory(error) == is_one


def test_what_was_wanted_is_read_where_memory_ran_out():
    error = while_handling(torch.OutOfMemoryError(ERROR), RuntimeError(CAPTURE))
    assert what_was_wanted(error) == "Tried to allocate 20.00 MiB"
    assert what_was_wanted(RuntimeError(CAPTURE)) == CAPTURE


def test_torch_itself_says_so_on_a_cpu():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert len(what_was_wanted(error.value)) <= 100
