"""The forty prompts and two seeds of the measure. They are fixed: nothing is tuned on them, and none is ever replaced.

Rule, settled before a picture of any of them was scored. Taken were all prompts of the earlier table of 95 whose real
models EfficientNet-Lite0 named in the top 5 of at least half of the views at 64 pixels
(tools/prior_judge_ceilings.json of commit 29d418e). Left out were nouns that anything has been tuned on (PROMPTS of
`benchmarks/bench_methods.py`, and those that `docs/design.md` names), and the weaker of two that show nearly the same
(beer bottle, coffee cup, cardboard box, screwdriver, basketball, helmet, crib, chest).
"""

from __future__ import annotations

from dataclasses import dataclass

SEEDS = (0, 1)

# prompt | nouns of the catalogue that show it | ImageNet-1k classes that name it | whether it has a front
_TABLE = """
a folding chair    | folding chair        | 559 | front
a bed              | bed                  | 564 831 750 | front
a washbasin        | washbasin            | 896 | front
a toilet           | toilet               | 861 | front
a microwave        | microwave            | 651 | front
a television       | television           | 851 664 782 | front
a laptop           | laptop               | 620 681 | front
a printer          | printer              | 742 713 | front
a speaker          | speaker              | 632 | front
a camera           | camera               | 759 732 | front
a car              | car                  | 817 511 436 468 751 627 656 581 479 661 | front
a bicycle          | bicycle              | 671 444 | front
a motorcycle       | motorcycle           | 670 665 | front
a tricycle         | tricycle             | 870 | front
a horse            | horse                | 339 | front
a rabbit           | rabbit               | 330 331 332 | front
a chicken          | chicken              | 7 8 | front
sunglasses         | sunglasses           | 836 837 | front
a toaster          | toaster              | 859 |
a pool table       | pool table           | 736 |
a crate            | crate                | 519 |
a barrel           | barrel               | 427 756 |
a mug              | mug                  | 504 968 |
a wine bottle      | wine bottle          | 907 440 |
a bowl             | bowl                 | 659 809 |
an espresso maker  | moka pot             | 505 550 849 |
a vase             | vase                 | 883 725 |
a potted plant     | potted plant, plant  | 738 |
a bonsai tree      | bonsai tree          | 738 |
a hamburger        | hamburger            | 933 |
a hot dog          | hot dog              | 934 |
a loaf of bread    | bread                | 930 |
a wheelbarrow      | wheelbarrow          | 428 |
a soccer ball      | soccer ball          | 805 |
a handbag          | handbag              | 748 636 |
an umbrella        | umbrella, parasol    | 879 |
a trash can        | trash can, wheelie bin | 412 463 |
a hammer           | hammer               | 587 |
a hat              | hat                  | 515 808 |
a camping tent     | camping tent         | 672 |
"""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the classes and models that would be right for it.

    Attributes:
        text: the prompt.
        nouns: of the catalogue's models that show it.
        classes: of ImageNet-1k that name it.
        has_front: one side of it is its front, which the others do not look like.
    """

    text: str
    nouns: tuple[str, ...]
    classes: tuple[int, ...]
    has_front: bool

    def name(self, seed: int) -> str:
        """The name of its run's folder."""
        return f"{self.text.replace(' ', '-')}-{seed}"


def _read(line: str) -> Prompt:
    text, nouns, classes, front = (cell.strip() for cell in line.split("|"))
    names = tuple(noun.strip() for noun in nouns.split(","))
    return Prompt(text, names, tuple(int(number) for number in classes.split()), front == "front")


PROMPTS = tuple(_read(line) for line in _TABLE.strip().splitlines())


def others(prompts: tuple[Prompt, ...], prompt: Prompt) -> list[Prompt]:
    """The prompts that no class is shared with: what an object is scored against as the permuted control."""
    return [other for other in prompts if not set(other.classes) & set(prompt.classes)]
