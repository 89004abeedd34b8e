"""Machines that look for differences: between the kernel and the model, and in the checker."""
