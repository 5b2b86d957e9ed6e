"""Tasks with a metric: what a row means, how it becomes tensors, how predictions are read and scored."""
