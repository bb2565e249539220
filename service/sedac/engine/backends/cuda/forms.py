"""Which form serves which number of tokens, and why; no Triton here.

A layer's MLP reads 3 D F weights once for all T tokens and computes 6 D F T FLOPs (D hidden size, F neurons). An H200 reads
4.8 TB/s and computes about 990 TFLOP/s in bf16 (data sheet, dense): up to about 200 tokens reading is what costs, so a token in
a batch saves time only if the weights that it leaves out are left out by every token of the batch.

- few (1 to 16): the weights are read once for all rows. A row that asks for all neurons makes all be read, so then the layer's own
  products run and reduced rows are masked there. With no such row, only what some row asks for is read: the leading neurons up
  to the widest, up and down of the union of the neurons that gates chose. At half the neurons active per row and independent
  choices the union is 1 - 0.5^T: 0.5, 0.75, 0.94 at 1, 2, 4 rows; past 4 a contextual level saves little, but costs nothing.
- middle (17 to 127): reading still rules, and padding rows to the matrix unit's 64 is the dense product's cost too. Only a
  layer that every row skips saves anything; else the layer's own products run, and reduced rows are masked.
- many (128 and more): arithmetic begins to rule, so fewer rows cost less. Rows that skip are left out by compaction, rows of one
  width end early together. Contextual rows share no neurons: they are computed whole and masked (same answers, no gain).
  From 128 up, since at 75 % skipping 32 rows or fewer are left below that, where reading takes as long as for 128.

SEDAC does not reduce where that can't pay: MLPs under `MIN_WEIGHT_BYTES` (a launch costs more than their reading; a setting), in the middle
form except for whole layers, in the many form where a token of the step was promised the model's own bits, and in passes that run
outside CUDA graphs because they are longer than the largest one: those take the plain form's way (see mlp.py).
All limits follow from bytes and FLOPs alone and are to be measured: benchmarks/cuda/kernels.py.
"""

FEW, MIDDLE, MANY = range(3)
"""The forms, numbered as the rows of the flags on the device."""
NUM_FORMS = 3
NAMES = ("few", "middle", "many")
MAX_FEW = 16
MIN_MANY = 128
MIN_WEIGHT_BYTES = 16 << 20
"""Least bytes of one MLP on one rank. Reading so many takes 3.5 us at 4.8 TB/s, about what the two launches of the few form take."""


def choose(num_tokens: int, *, has_neurons: bool, is_dense: bool, weight_bytes: int, min_weight_bytes: int = MIN_WEIGHT_BYTES) -> int:
    """Return the form of one MLP for a graph of `num_tokens` rows.

    `has_neurons`: the probe set's reduced levels are attached; `is_dense`: the weights are plain matrices that kernels can read; an MLP of
    fewer than `min_weight_bytes` is not reduced at few rows.
    """
    if num_tokens >= MIN_MANY and is_dense:
        return MANY
    if num_tokens <= MAX_FEW and has_neurons and weight_bytes >= min_weight_bytes:
        return FEW
    return MIDDLE
