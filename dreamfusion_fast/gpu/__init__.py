"""The GPU beside its kernels: captured graphs, memory, and the stages that a profile shows."""
