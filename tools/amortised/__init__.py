"""The training of the amortised initialisation: a caption and a code become an object's planes; see tools/README.md."""
