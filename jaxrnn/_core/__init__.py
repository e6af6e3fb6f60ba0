"""The engine room: what runs a call of a module or function. Nobody outside jaxrnn imports it.

In the order in which to read it:

- `options`: how to run.
- `steps`: one step of a layer, with its weights. `layouts`: the layout of its gates.
- `blocks`: the scan over blocks of steps. `jaxrnn.engines`: the loop over the steps of a block.
- `recurrence`: one layer in one direction, and its derivative.
- `stack`: all layers and directions, with dropout.
- `calls`: checks, and conversion of what a user gives to what `stack` takes, and back.
- `platforms`, `rules` and `meshes`: what JAX needs to know. `flax_cell` and `flax_sharding`: what Flax needs to know.

Shapes, here and in `jaxrnn.engines`:

    T    steps in time; of a block in its loop
    B    rows of the batch
    I    features of a layer's input
    H    hidden units, hidden_size
    P    features of a layer's output: proj_size, or H without a projection
    G    gates of the cell: 4 for an LSTM
    D    directions: 2 if bidirectional, else 1
    L    layers

The first state of a cell is its output: (B, P), where the others are (B, H). A step without a time axis has the same
shapes without T.
"""
