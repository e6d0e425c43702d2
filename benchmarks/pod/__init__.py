"""What a training step costs on a TPU pod, read from the programs of its compiler."""
