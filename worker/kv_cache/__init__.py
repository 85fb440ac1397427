"""Where keys and values of computed tokens live: tensors, their layout and size."""
