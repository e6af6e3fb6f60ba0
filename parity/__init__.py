"""The parity suite: every kind of module against torch, values and gradients, with torch or without it.

`python -m parity` from the root of a clone compares with the results that torch gave when they were recorded.
`cases` is the table, `sides` runs a case with one library, `reference` is what torch gives, recorded or live,
`compare` measures and judges, `report` prints.
"""
