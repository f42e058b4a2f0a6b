"""Triton kernels, one file per operation, and nothing else: no autograd, no checks, no PyTorch arithmetic.

Imported on first use, so that machines without Triton keep the PyTorch path. The functions one level up have the same
names, check the arguments and decide which path runs; their docstrings hold the formulas.
"""
