"""Shapes of the learning rate after warm-up, one module each: `share(progress, train) -> float`.

`progress` goes from 0 (first step after warm-up) to 1 (last step); the share is 1 at the peak rate and 0 at `train.lr_min`. Pure, and
never rising.
"""
