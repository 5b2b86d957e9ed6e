"""Fine-tune large language models with adapters whose ranks are decided during training, on DeepSpeed."""

__version__ = "0.1.0"
