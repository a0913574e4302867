"""Many prompts from one file: read and checked as a whole, run on Ray's workers, shown on one page."""
