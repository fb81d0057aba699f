"""Update rules, one module each: `make(model, train) -> Optimizer`.

The model is built and sharded; only its trainable parameters are given to the optimizer. Everything that the next update depends on is
a tensor in `optimizer.state` or fixed by `train`, so that a checkpoint holds it; `lr` of every group is set before each step.
"""
