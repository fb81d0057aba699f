"""Input formats: one module each, found by its name.

`parse(value) -> Sample` of a row's value, or Rejected with the reason; `recognises(value) -> str | None`, what shows that it is this one.
"""
