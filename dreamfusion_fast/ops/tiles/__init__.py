"""The ops over buffers of the caller, one tile of samples after another: what the streaming renderer runs on."""
