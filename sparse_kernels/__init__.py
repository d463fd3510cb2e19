"""Native kernels of sparserve: tensors and pointers in, nothing known of the server."""
