"""Triton kernels of the guided contrastive loss: one file a pass, and nothing of gist_fast above.

==============  ====================================================================================================
`layout`        tiles, and where in memory a pair's mask bit stands (no Triton needed)
`parts`         the rectangle of scores that the kernels work on: its operands, and what decides its masks
`tile`          what every kernel shares: a tile of scores, and masks between bools and bits
`groups`        pairs of one group, as words, before any product
`decide`        what does not count in a tile: by a guide, groups, floors
`forward`       scores, masks and logsumexp in one pass
`backward`      the gradient, its derivation, and the two plans for it
`staged`        plan for wide embeddings: tiles of coefficients, then library products
`masks`         masks by themselves: what floors go on from, and a chunk's for a backward pass that kept none
`owned`         plan for narrow ones: a program owns gradient rows
`unpack`        a mask as a matrix to multiply by, for the triplet term
`config`        the table of configurations
`tuning`        opt-in tuning and its cache on disk
`launch`        how a kernel is started
`targets`       the kinds of GPU that kernels are compiled for
`variants`      the kernels of a configuration, as the loss's variants start them
`report`        what each configuration compiles to, on any machine
==============  ====================================================================================================

Only `layout`, `parts` and `config` can be imported without Triton.
"""
