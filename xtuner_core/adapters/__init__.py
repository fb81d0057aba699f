"""Training methods (`train.method`), applied before sharding: one module each, found by its name.

A method has `load(model_dir, train, **options)`, which gives these options to `from_pretrained` beside its own;
`prepare(model, train, seed)`, which leaves exactly the parameters that train with `requires_grad`, the same on every rank; and, if they
lie beside the model's own weights, `save_adapter(tensors, train, base, folder)`, which writes them as a folder that peft loads.
`READ_BY_ALL = True` lets every process read the weights; otherwise the first does, and the others get their shards of its parameters.
"""

import logging

# peft imports bitsandbytes, which warns of a kernel that is not installed; it is for the layout that `qlora.load` switches off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
