"""What lies between a layer's products and its attention, in a few Triton kernels, for models of the common shape."""
