"""The parity suite: every kind of module against torch, values and gradients, with torch or without it.

`jaxrnn parity`, or `python -m parity` from the root of a clone, compares with results recorded from
torch. The folder `parity` of a clone is installed as `jaxrnn.parity`, so imports within it are relative.
`cases` is the table, `sides` runs a case with one library, `reference` has torch's results, recorded or live, `compare`
measures and judges, `report` prints. The package `timing` has the timings.
"""
