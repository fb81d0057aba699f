"""Tensors of one form of a model become another, streamed one at a time: engine checkpoint, Hugging Face folder, adapter, .pth, GGUF.

A model is a mapping name → `Lazy` (`tensors.py`): its shape and type are known, its numbers are read when they are written.
"""
