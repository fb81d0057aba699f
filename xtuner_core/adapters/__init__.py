"""Training methods (`train.method`), applied before sharding: one module each, found by its name.

A method has `load_options(train)`, keyword arguments of `from_pretrained`; `prepare(model, train, seed)`, which leaves exactly the
parameters that train with `requires_grad`, the same on every rank; and, if they lie beside the model's own weights,
`save_adapter(tensors, lora, base, folder)`, which writes them as a folder that peft loads.
"""
