"""Networks that turn images into feature maps; a file each."""
