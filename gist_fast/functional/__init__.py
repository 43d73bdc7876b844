"""The loss as a function of embeddings: settings, checks, blocks of pairs, and the backends that compute it.

`gist_fast.guided_contrastive_loss` is the way in. Nothing is imported here, so that `loss_config` can be read without
torch.
"""
