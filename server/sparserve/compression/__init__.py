"""What is done to weights before they are packed: pure functions over one layer."""
