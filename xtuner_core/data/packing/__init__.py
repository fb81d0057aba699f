"""Ways to fill packs, one module each: `pack(lengths, capacity, seed) -> Packs`.

`lengths` int `[documents]` in tokens; `capacity` tokens a pack; a document without tokens is in no pack. Deterministic.
"""
