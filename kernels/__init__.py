"""Triton kernels of the guided contrastive loss: one file a pass, and nothing of gist_fast above.

==================  ================================================================================================
`layout`            tiles, and where in memory the mask bit of a pair stands (no Triton needed)
`rectangle`         the rectangle of scores that a pass works on: its operands, and what masks its pairs
`tile`              what every kernel shares: its location, a tile of scores, and masks between bools and bits
`groups`            pairs of one group, as an initial mask, before any product
`decide`            what masks the pairs of a tile: guide thresholds, student thresholds
`forward`           scores, masks and logsumexp in one pass
`masks`             masks by themselves: what student thresholds go on from, and a chunk's mask for a backward pass
                    that kept none
`dlogits`           the backward pass: the gradient, tiles of dlogits, then library products
`unpack`            a mask as a matrix to multiply by, for terms that are means over a row's negatives
`distil`            distillation from the guide: both models' scores of a tile, forward and back
`distil_reduce`     its partial results to those of each row
`precision`         how float32 is multiplied (no Triton needed)
`config`            the table of configurations (no Triton needed)
`tuning`            opt-in tuning and its cache on disk
`launch`            how a kernel is started, and how launches are recorded
`targets`           the kinds of GPU that kernels are compiled for
`compile_variants`  what Triton compiles for recorded launches
`compile_report`    what that comes to, on any machine
==================  ================================================================================================

`layout`, `rectangle`, `precision` and `config` can be imported without Triton.
"""
