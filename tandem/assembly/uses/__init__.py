"""What is done with a model without training it, one file each."""
