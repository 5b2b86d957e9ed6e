"""From a checkpoint to a LoRA adapter or a merged model."""
