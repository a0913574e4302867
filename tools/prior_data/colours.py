"""Name the colours of rendered views with the eleven basic colour words."""

import numpy as np

COLOURS = ("black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")


def classify(rgb: np.ndarray) -> np.ndarray:
    """Index into COLOURS, or -1 where no basic word fits (beige, olive), for display colours [..., 3] in [0, 1]."""
    high, low = rgb.max(-1), rgb.min(-1)
    chroma = high - low
    saturation = chroma / np.maximum(high, 1e-6)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    safe = np.maximum(chroma, 1e-6)
    hue = np.select(
        [high == red, high == green], [((green - blue) / safe) % 6, (blue - red) / safe + 2], (red - green) / safe + 4
    )
    hue *= 60
    warm = (hue >= 12) & (hue < 48)
    rules = [
        (high < 0.17, "black"),
        ((high < 0.25) & (saturation < 0.3), "black"),
        ((saturation < 0.12) & (high > 0.78), "white"),
        (saturation < 0.14, "grey"),
        (warm & (saturation >= 0.92) & (high >= 0.72) & (hue < 42), "orange"),
        (warm & (saturation >= 0.28) & (high < 0.66), "brown"),
        (warm & (saturation >= 0.35) & (high < 0.83) & (hue < 42), "brown"),
        (warm & (saturation >= 0.62) & (hue < 42), "orange"),
        ((hue >= 42) & (hue < 68) & (saturation > 0.45) & (high > 0.6), "yellow"),
        ((hue >= 68) & (hue < 168) & (saturation > 0.2), "green"),
        ((hue >= 48) & (hue < 68) & (saturation > 0.3) & (high < 0.45), "green"),
        ((hue >= 185) & (hue < 258) & (saturation > 0.2), "blue"),
        ((hue >= 258) & (hue < 305) & (saturation > 0.2), "purple"),
        (((hue >= 305) | (hue < 12)) & (saturation < 0.55) & (high > 0.7), "pink"),
        ((hue >= 305) & (hue < 338) & (high > 0.55), "pink"),
        ((hue >= 305) & (hue < 338), "purple"),
        (((hue >= 338) | (hue < 12)) & (saturation > 0.4) & (high > 0.25), "red"),
    ]
    return np.select([mask for mask, _ in rules], [COLOURS.index(word) for _, word in rules], -1)


def dominant(rgb: np.ndarray, weight: np.ndarray) -> list[str]:
    """Up to two words that clearly describe the visible colours [..., 3], weighted by ``weight`` [...]; often none."""
    names = classify(rgb).ravel()
    share = np.bincount(names + 1, weights=weight.ravel(), minlength=len(COLOURS) + 1) / max(weight.sum(), 1e-6)
    order = np.argsort(-share[1:])
    first, second = (float(share[1:][i]) for i in order[:2])
    if first >= 0.62 or (first >= 0.5 and second < 0.2):
        return [COLOURS[order[0]]]
    if second >= 0.25 and first + second >= 0.8:
        return [COLOURS[order[0]], COLOURS[order[1]]]
    return []
