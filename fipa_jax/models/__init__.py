"""The networks, and the convolution that they share: `networks` and `convolution`."""
