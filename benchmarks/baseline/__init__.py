"""What this project is measured against: DETR as a textbook would write it, written for the comparison.

``torch.nn.MultiheadAttention``, frozen batch norm computed as a layer, one matcher call and one loss pass a decoder
layer, images as they come, AdamW and ``clip_grad_norm_`` with their defaults, a ``DataLoader`` over Pillow transforms.
Nothing in it is slow on purpose. Parameter names are the published ones, so that weights go both ways, and
``tests/test_baseline.py`` holds it to the same outputs, losses and gradients: without that, times say nothing.
"""
