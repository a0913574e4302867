"""Data for the embedded prior: a catalogue of named 3D models, rendered to 64x64 views with captions, and its judge."""
