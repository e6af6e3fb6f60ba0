"""The engine room: it runs the calls of modules and functions. Import nothing of it outside jaxrnn.

In the order in which to read it:

- `options`: how to run.
- `steps`: one step of a layer, with its weights. `layouts`: the layout of its gates.
- `blocks`: the scan over blocks of steps. `jaxrnn.engines`: the loop over the steps of a block. `affine`: all of them
  at once, where they are linear in the state.
- `recurrence`: one layer in one direction, and its derivative.
- `stack`: all layers and directions, with dropout.
- `calls`: checks a user's arguments, converts them to time-major rows, and converts the results back.
- `platforms`: functions that differ by platform. `rules`: derivative rules that are safe under vmap. `meshes`: arrays
  on meshes with Explicit axes. `flax_cell` and `flax_sharding`: Flax's conventions.

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
