"""COCO data: what there is, in which order it is seen, and how it becomes padded batches."""
